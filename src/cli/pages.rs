//! Implements `postrider completions` and `postrider man`, which are generated from the arguments.

use std::path::{Path, PathBuf};

use clap::{Args, CommandFactory};
use clap_complete::Shell;

use super::{Cli, Error, text};

pub const COMPLETIONS_EXAMPLES: &str = "\
Examples:
  postrider completions bash > /etc/bash_completion.d/postrider
  postrider completions zsh > ~/.zfunc/_postrider
  postrider completions fish > ~/.config/fish/completions/postrider.fish
  source <(postrider completions bash)        only in this shell";

pub const MAN_EXAMPLES: &str = "\
Examples:
  postrider man | man -l -                    show the page of postrider
  postrider man --dir ~/.local/share/man/man1
  man postrider-dlq-list                      after that";

#[derive(Args)]
pub struct Completions {
    /// Shell to write completions for
    #[arg(value_enum)]
    shell: Shell,
}

#[derive(Args)]
pub struct Man {
    /// Write a page for every command into this directory instead of one page to stdout
    #[arg(long, value_name = "DIR")]
    dir: Option<PathBuf>,
}

impl Completions {
    pub fn run(&self) -> Result<(), Error> {
        let mut script = Vec::new();
        clap_complete::generate(self.shell, &mut Cli::command(), "postrider", &mut script);
        text::print(&String::from_utf8_lossy(&script))?;
        Ok(())
    }
}

impl Man {
    pub fn run(&self) -> Result<(), Error> {
        match &self.dir {
            Some(dir) => write_all(dir),
            None => {
                let mut page = Vec::new();
                clap_mangen::Man::new(Cli::command()).render(&mut page).map_err(Error::Pages)?;
                text::print(&String::from_utf8_lossy(&page))?;
                Ok(())
            }
        }
    }
}

fn write_all(dir: &Path) -> Result<(), Error> {
    std::fs::create_dir_all(dir).map_err(Error::Pages)?;
    clap_mangen::generate_to(Cli::command(), dir).map_err(Error::Pages)?;
    text::print(&format!("wrote the pages into {}\n", dir.display()))?;
    Ok(())
}
