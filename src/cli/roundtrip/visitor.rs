//! The client that a round trip uses, with names of its own.

use std::ops::Deref;

use uuid::Uuid;

use super::super::{
    api::{Api, Error},
    server,
};

/// Client of one installation. Cheap to clone.
#[derive(Clone)]
pub struct Visitor {
    api: Api,
    /// Part of every name that the run writes, so that it never matches another client's data.
    pub mark: String,
}

impl Visitor {
    pub fn new(url: &str) -> Result<Self, Error> {
        Ok(Self { api: server::client(url, "--url")?, mark: Uuid::now_v7().simple().to_string() })
    }
}

impl Deref for Visitor {
    type Target = Api;

    fn deref(&self) -> &Api {
        &self.api
    }
}
