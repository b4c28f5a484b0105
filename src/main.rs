//! Parses the command line and dispatches.

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

fn main() -> std::process::ExitCode {
    // Keeps OpenSSL from cleaning up at exit, under the threads of Kafka's clients that still use it. Whoever
    // initializes OpenSSL first decides that, so this comes before everything else.
    openssl::init();
    // The allocator asks for huge pages, which more than double the memory of an idle process. Fails
    // only where the kernel has none.
    let _ = rustix::thread::disable_transparent_huge_pages(true);
    match postrider::cli::main() {
        Ok(()) => std::process::ExitCode::SUCCESS,
        Err(problem) => {
            eprintln!("postrider: {problem}");
            std::process::ExitCode::FAILURE
        }
    }
}
