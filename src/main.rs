//! Parses the command line and dispatches.

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

fn main() -> std::process::ExitCode {
    match postrider::cli::main() {
        Ok(()) => std::process::ExitCode::SUCCESS,
        Err(problem) => {
            eprintln!("postrider: {problem}");
            std::process::ExitCode::FAILURE
        }
    }
}
