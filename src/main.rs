//! The `attar` binary: parse, dispatch, and one place that turns an error into text and an exit code:
//! 0 done, 1 a check or gate failed, 2 an error.

#![allow(clippy::print_stdout, clippy::print_stderr, reason = "the binary is what prints")]

/// Prints a line. A reader that has gone away (`attar inspect ... | head`) is no error; output that is lost
/// otherwise (a full disk) must not look like success.
macro_rules! say {
    ($($text:tt)*) => {{
        use std::io::Write;
        if let Err(error) = writeln!(std::io::stdout(), $($text)*)
            && error.kind() != std::io::ErrorKind::BrokenPipe
        {
            eprintln!("error: standard output: {error}");
            std::process::exit(2);
        }
    }};
}

mod args;
mod bundle;
mod commands;
mod compile;
mod contract;
mod gguf;
mod importance;
mod measure;
mod packed;
mod progress;
mod provenance;
mod registry;
mod sparsity;
mod trace;
mod verify;

use std::process::ExitCode;

use clap::Parser;

/// Any error on its way to the terminal.
pub(crate) type Error = Box<dyn std::error::Error>;

fn main() -> ExitCode {
    let args = match args::Args::try_parse() {
        Ok(args) => args,
        Err(error) => {
            let _ = error.print();
            return ExitCode::from(if error.use_stderr() { 2 } else { 0 });
        }
    };
    match commands::run(args) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::from(1),
        Err(error) => {
            let mut text = error.to_string();
            let mut cause = error.source();
            while let Some(inner) = cause {
                let inner_text = inner.to_string();
                if !text.contains(&inner_text) {
                    text = format!("{text}: {inner_text}");
                }
                cause = inner.source();
            }
            eprintln!("error: {text}");
            ExitCode::from(2)
        }
    }
}
