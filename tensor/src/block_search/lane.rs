//! Vectors of f32 with operators, so that arithmetic on lanes reads like arithmetic.

#![allow(
    clippy::inline_always,
    reason = "a body that is not inlined loses the vector instructions"
)]

use std::ops::{Add, Div, Mul, Neg, Sub};

use pulp::Simd;

/// One vector, each lane on its own.
#[derive(Clone, Copy)]
pub struct Lane<S: Simd>(pub S, pub S::f32s);

/// A condition on each lane.
#[derive(Clone, Copy)]
pub struct Choice<S: Simd>(S, S::m32s);

impl<S: Simd> std::fmt::Debug for Lane<S> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("Lane").field(&self.1).finish()
    }
}

impl<S: Simd> std::fmt::Debug for Choice<S> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("Choice").field(&self.1).finish()
    }
}

impl<S: Simd> Lane<S> {
    /// The same number in each lane.
    #[inline(always)]
    pub fn splat(simd: S, x: f32) -> Self {
        Self(simd, simd.splat_f32s(x))
    }

    /// Lanes from the front of `x`.
    #[inline(always)]
    pub fn load(simd: S, x: &[f32]) -> Self {
        Self(simd, S::as_simd_f32s(&x[..S::F32_LANES]).0[0])
    }

    /// Lanes to the front of `x`.
    #[inline(always)]
    pub fn store(self, x: &mut [f32]) {
        S::as_mut_simd_f32s(&mut x[..S::F32_LANES]).0[0] = self.1;
    }

    /// `self · a + b`, rounded once.
    #[inline(always)]
    pub fn mul_add(self, a: Self, b: Self) -> Self {
        Self(self.0, self.0.mul_add_f32s(self.1, a.1, b.1))
    }

    /// The smaller.
    #[inline(always)]
    pub fn min(self, other: Self) -> Self {
        Self(self.0, self.0.min_f32s(self.1, other.1))
    }

    /// The larger.
    #[inline(always)]
    pub fn max(self, other: Self) -> Self {
        Self(self.0, self.0.max_f32s(self.1, other.1))
    }

    /// Without its sign.
    #[inline(always)]
    pub fn abs(self) -> Self {
        Self(self.0, self.0.abs_f32s(self.1))
    }

    /// The nearest integer, ties to even, of numbers below 2²² in size.
    #[inline(always)]
    pub fn round(self) -> Self {
        let shift = Self::splat(self.0, 12_582_912.0);
        (self + shift) - shift
    }

    /// True where it is below `other`.
    #[inline(always)]
    pub fn below(self, other: Self) -> Choice<S> {
        Choice(self.0, self.0.less_than_f32s(self.1, other.1))
    }

    /// Each lane through `f`, one by one.
    #[inline(always)]
    pub fn each(self, f: impl Fn(f32) -> f32) -> Self {
        let mut values = [0.0f32; 16];
        self.store(&mut values);
        for v in &mut values[..S::F32_LANES] {
            *v = f(*v);
        }
        Self::load(self.0, &values)
    }
}

impl<S: Simd> Choice<S> {
    /// `yes` where true, else `no`.
    #[inline(always)]
    pub fn select(self, yes: Lane<S>, no: Lane<S>) -> Lane<S> {
        Lane(self.0, self.0.select_f32s(self.1, yes.1, no.1))
    }
}

impl<S: Simd> Add for Lane<S> {
    type Output = Self;
    #[inline(always)]
    fn add(self, other: Self) -> Self {
        Self(self.0, self.0.add_f32s(self.1, other.1))
    }
}

impl<S: Simd> Sub for Lane<S> {
    type Output = Self;
    #[inline(always)]
    fn sub(self, other: Self) -> Self {
        Self(self.0, self.0.sub_f32s(self.1, other.1))
    }
}

impl<S: Simd> Mul for Lane<S> {
    type Output = Self;
    #[inline(always)]
    fn mul(self, other: Self) -> Self {
        Self(self.0, self.0.mul_f32s(self.1, other.1))
    }
}

impl<S: Simd> Div for Lane<S> {
    type Output = Self;
    #[inline(always)]
    fn div(self, other: Self) -> Self {
        Self(self.0, self.0.div_f32s(self.1, other.1))
    }
}

impl<S: Simd> Neg for Lane<S> {
    type Output = Self;
    #[inline(always)]
    fn neg(self) -> Self {
        Self(self.0, self.0.neg_f32s(self.1))
    }
}
