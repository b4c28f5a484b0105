//! Error codes of the routes for keys.

postrider_http::codes! {
    KEY_UNKNOWN "key_unknown" NOT_FOUND "No such API key"
        "There is no API key with this id. `GET /admin/keys` lists the ids.";
}
