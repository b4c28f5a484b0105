//! Parses the command line and dispatches.

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

fn main() -> std::process::ExitCode {
    // Initializes OpenSSL without its clean-up at exit, which would free memory that the threads
    // of the Kafka clients still use. The first initialization decides, so this call comes first.
    openssl::init();
    // The allocator asks for huge pages, which more than double the memory of an idle process.
    // The call fails only on kernels without huge pages, so its result is ignored.
    let _ = rustix::thread::disable_transparent_huge_pages(true);
    match postrider::cli::main() {
        Ok(()) => std::process::ExitCode::SUCCESS,
        Err(error) => error.report(),
    }
}
