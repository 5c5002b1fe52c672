//! A device that holds buffers and launches kernels, and a linear that lives on one.

use super::geometry::{
    ArrangeArgument, Generation, Half, Launch, MatmulArgument, MatmulLaunch, Problem,
};
use super::packed::{CudaWeights, ScaleKind};

/// Holds buffers and launches kernels, one after the other. A GPU, or in tests the shim that runs kernels on the CPU.
pub trait Device {
    /// Memory of the device.
    type Buffer;
    /// Why something failed.
    type Error: std::error::Error + Send + Sync + 'static;

    /// What its kernels may use.
    fn generation(&self) -> Generation;

    /// Copies bytes to the device.
    ///
    /// # Errors
    /// No memory, or a device that failed.
    fn upload(&self, bytes: &[u8]) -> Result<Self::Buffer, Self::Error>;

    /// Bytes of zeros on the device.
    ///
    /// # Errors
    /// As [`Device::upload`].
    fn zeros(&self, bytes: usize) -> Result<Self::Buffer, Self::Error>;

    /// Copies a buffer back, after everything that was launched before.
    ///
    /// # Errors
    /// A device that failed, perhaps in an earlier launch.
    fn download(&self, buffer: &Self::Buffer) -> Result<Vec<u8>, Self::Error>;

    /// Launches a kernel; `links` are buffers whose addresses stand at these bytes of `argument`.
    ///
    /// # Errors
    /// An unknown kernel, or a device that refuses it.
    fn launch(
        &self,
        launch: &Launch,
        argument: &[u8],
        links: &[(usize, &Self::Buffer)],
    ) -> Result<(), Self::Error>;
}

/// A weight on a device.
#[derive(Debug)]
pub struct DeviceLinear<B> {
    /// Bits per code.
    pub bits: u8,
    /// Rows of the weight.
    pub rows: usize,
    /// Columns of the weight.
    pub columns: usize,
    /// Chunks of a row.
    pub chunks: usize,
    /// Half chunks of a group.
    pub group_halves: usize,
    /// Type of the scales.
    pub scale_kind: ScaleKind,
    /// Packed codes.
    pub codes: B,
    /// Scales.
    pub scales: B,
    /// Zero points, unless all stand in the middle.
    pub zeros: Option<B>,
    /// Column of each place, unless they are the same.
    pub order: Option<B>,
    /// What the device's kernels may use.
    pub generation: Generation,
}

/// Memory that a product needs beside its operands.
#[derive(Debug)]
pub struct Workspace<B> {
    partial: Option<(B, B)>,
}

impl<B> DeviceLinear<B> {
    /// Copies packed weights to a device.
    ///
    /// # Errors
    /// Whatever the device says.
    pub fn upload<D: Device<Buffer = B>>(device: &D, w: &CudaWeights) -> Result<Self, D::Error> {
        let order = w.places.order.as_ref();
        Ok(Self {
            bits: w.bits,
            rows: w.rows,
            columns: w.columns,
            chunks: w.places.chunks,
            group_halves: w.places.group_halves,
            scale_kind: w.scale_kind,
            codes: device.upload(&w.codes)?,
            scales: device.upload(&w.scales)?,
            zeros: w.zeros.as_ref().map(|zeros| device.upload(zeros)).transpose()?,
            order: order.map(|order| device.upload(bytemuck::cast_slice(order))).transpose()?,
            generation: device.generation(),
        })
    }

    fn problem(&self, half: Half, m: usize) -> Problem {
        Problem {
            bits: self.bits,
            half,
            rows: self.rows,
            chunks: self.chunks,
            group_halves: self.group_halves,
            m,
            generation: self.generation,
        }
    }

    /// The launch that multiplies `m` tokens.
    pub fn matmul_launch(&self, half: Half, m: usize) -> MatmulLaunch {
        self.problem(half, m).launch()
    }

    /// Launches of all kernels that multiply `m` tokens, the chosen one first.
    pub fn matmul_launches(&self, half: Half, m: usize) -> Vec<MatmulLaunch> {
        self.problem(half, m).launches()
    }

    /// Memory for [`DeviceLinear::matmul`].
    ///
    /// # Errors
    /// Whatever the device says.
    pub fn workspace<D: Device<Buffer = B>>(
        &self,
        device: &D,
        launch: &MatmulLaunch,
    ) -> Result<Workspace<B>, D::Error> {
        let partial = if launch.partial_bytes > 0 {
            Some((device.zeros(launch.partial_bytes)?, device.zeros(4 * launch.counters)?))
        } else {
            None
        };
        Ok(Workspace { partial })
    }

    /// Launches `out [m, rows] = x · Wᵀ`. `x [m, places]` stands in the order of places, padding zero.
    ///
    /// # Errors
    /// Whatever the device says.
    pub fn matmul<D: Device<Buffer = B>>(
        &self,
        device: &D,
        launch: &MatmulLaunch,
        workspace: &Workspace<B>,
        (x, out, m): (&B, &B, usize),
    ) -> Result<(), D::Error> {
        let argument = MatmulArgument {
            pointers: [0; 7],
            m: m as i32,
            rows: self.rows as i32,
            chunks: self.chunks as i32,
            group_halves: self.group_halves as i32,
            scale_kind: self.scale_kind as i32,
            splits: launch.splits as i32,
            x_stride: (self.chunks * super::packed::CHUNK) as i64,
            out_stride: self.rows as i64,
        };
        let mut links = vec![(0, &self.codes), (8, &self.scales), (24, x), (32, out)];
        links.extend(self.zeros.iter().map(|zeros| (16, zeros)));
        if let Some((partial, arrived)) = &workspace.partial {
            links.extend([(40, partial), (48, arrived)]);
        }
        device.launch(&launch.launch, bytemuck::bytes_of(&argument), &links)
    }

    /// Multiplies tokens that stand on the host by one of [`DeviceLinear::matmul_launches`]: `x [m, columns]` and the result
    /// `[m, rows]` are bits of a half-precision type, that of the launch.
    ///
    /// # Errors
    /// Whatever the device says.
    pub fn multiply<D: Device<Buffer = B>>(
        &self,
        device: &D,
        launch: &MatmulLaunch,
        x: &[u16],
        m: usize,
    ) -> Result<Vec<u16>, D::Error> {
        assert_eq!(x.len(), m * self.columns, "x is [m, columns]");
        let workspace = self.workspace(device, launch)?;
        let out = device.upload(&vec![0xffu8; 2 * m * self.rows])?;
        let x = device.upload(bytemuck::cast_slice(x))?;
        let x = match &self.order {
            None => x,
            Some(order) => self.arrange(device, order, (&x, m))?,
        };
        self.matmul(device, launch, &workspace, (&x, &out, m))?;
        let bytes = device.download(&out)?;
        Ok(bytes.chunks_exact(2).map(|b| u16::from_le_bytes([b[0], b[1]])).collect())
    }

    /// Puts activations into the order of places.
    fn arrange<D: Device<Buffer = B>>(
        &self,
        device: &D,
        order: &B,
        (x, m): (&B, usize),
    ) -> Result<B, D::Error> {
        let places = self.chunks * super::packed::CHUNK;
        let out = device.zeros(2 * m * places)?;
        let argument = ArrangeArgument {
            pointers: [0; 3],
            m: m as i32,
            places: places as i32,
            x_stride: self.columns as i64,
            out_stride: places as i64,
        };
        let launch = super::geometry::arrange_launch(places, m);
        let links = [(0, x), (8, order), (16, &out)];
        device.launch(&launch, bytemuck::bytes_of(&argument), &links)?;
        Ok(out)
    }
}
