use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::*;

#[derive(Debug, Clone, Default, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
struct Settings {
    /// Addresses to listen on.
    listen: Vec<String>,
    store: Store,
    /// Routes from topics to targets.
    routes: Vec<Route>,
}

#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
struct Route {
    /// Source topic.
    topic: String,
    target: SecretUrl,
    rate: f64,
    mode: Mode,
    headers: Secrets,
}

impl Default for Route {
    fn default() -> Self {
        Self {
            topic: String::new(),
            target: SecretUrl::default(),
            rate: 10.0,
            mode: Mode::Quick,
            headers: Default::default(),
        }
    }
}

#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
struct Store {
    /// Password of the store.
    password: Secret,
    size_bytes: u64,
    #[schemars(range(min = 1))]
    shards: u8,
    mode: Mode,
    properties: Properties,
    headers: Secrets,
}

impl Default for Store {
    fn default() -> Self {
        Self {
            password: Secret::new("changeme"),
            size_bytes: 7,
            shards: 1,
            mode: Mode::Quick,
            properties: Default::default(),
            headers: Default::default(),
        }
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
enum Mode {
    Quick,
    Thorough,
}

fn from_environment(pairs: &[(&str, &str)]) -> Result<Loaded<Settings>, Error> {
    let none = Overrides { file: Some("/dev/null".into()), flags: Vec::new() };
    load(&none, pairs.iter().map(|(name, value)| (name.to_string(), value.to_string())))
}

fn scratch(name: &str, text: &str) -> std::path::PathBuf {
    let path = std::env::temp_dir().join(format!("postrider-config-{}-{name}", std::process::id()));
    std::fs::write(&path, text).unwrap();
    path
}

#[test]
fn the_environment_sets_every_kind_of_value() {
    let loaded = from_environment(&[
        ("POSTRIDER_LISTEN", "a:1, b:2"),
        ("POSTRIDER_STORE__PASSWORD", "12345"),
        ("POSTRIDER_STORE__SIZE_BYTES", "9"),
        ("POSTRIDER_STORE__MODE", "thorough"),
        ("POSTRIDER_STORE__PROPERTIES__LINGER.MS", "5"),
    ])
    .unwrap();
    assert_eq!(loaded.settings.listen, ["a:1", "b:2"]);
    assert_eq!(loaded.settings.store.password.expose(), "12345");
    assert_eq!(loaded.settings.store.size_bytes, 9);
    assert_eq!(loaded.settings.store.mode, Mode::Thorough);
    assert_eq!(loaded.settings.store.properties["linger.ms"], "5");
    assert_eq!(loaded.sources["store.size_bytes"], "POSTRIDER_STORE__SIZE_BYTES");
}

#[test]
fn a_later_layer_wins_and_the_rest_stays_at_its_default() {
    let file = scratch("layers.yaml", "store:\n  size_bytes: 1\n  mode: thorough\n");
    let flags = vec![("store.size_bytes".to_owned(), "3".to_owned(), "--set")];
    let overrides = Overrides { file: Some(file), flags };
    let environment = [("POSTRIDER_STORE__SIZE_BYTES".to_owned(), "2".to_owned())];
    let loaded = load::<Settings>(&overrides, environment.into_iter()).unwrap();
    assert_eq!(loaded.settings.store.size_bytes, 3);
    assert_eq!(loaded.settings.store.mode, Mode::Thorough);
    assert!(loaded.settings.listen.is_empty());
}

#[test]
fn an_unknown_key_names_the_nearest_known_one() {
    let error = from_environment(&[("POSTRIDER_STORE__SIZE_BYTE", "9")]).unwrap_err().to_string();
    assert!(error.contains("POSTRIDER_STORE__SIZE_BYTE") && error.contains("`store.size_bytes`"), "{error}");
    let file = scratch("unknown.yaml", "stor:\n  size_bytes: 1\n");
    let overrides = Overrides { file: Some(file), flags: Vec::new() };
    let error = load::<Settings>(&overrides, std::iter::empty()).unwrap_err().to_string();
    assert!(error.contains("unknown key `stor`") && error.contains("unknown.yaml"), "{error}");
}

#[test]
fn a_bad_value_names_its_source_and_what_was_expected() {
    let error = from_environment(&[("POSTRIDER_STORE__SIZE_BYTES", "many")]).unwrap_err().to_string();
    assert!(error.contains("POSTRIDER_STORE__SIZE_BYTES") && error.contains("whole number"), "{error}");
    let error = from_environment(&[("POSTRIDER_STORE__MODE", "slow")]).unwrap_err().to_string();
    assert!(error.contains("one of quick, thorough"), "{error}");
    let error = from_environment(&[("POSTRIDER_STORE__SIZE_BYTES", "-1")]).unwrap_err().to_string();
    assert!(error.contains("POSTRIDER_STORE__SIZE_BYTES") && error.contains("a whole number of 0 or more"), "{error}");
    let error = from_environment(&[("POSTRIDER_STORE__SHARDS", "300")]).unwrap_err().to_string();
    assert!(error.contains("POSTRIDER_STORE__SHARDS") && error.contains("between 1 and 255"), "{error}");
}

#[test]
fn a_secret_is_read_from_a_file_and_never_shown() {
    let file = scratch("secret", "hunter2\n");
    let loaded = from_environment(&[("POSTRIDER_STORE__PASSWORD_FILE", file.to_str().unwrap())]).unwrap();
    assert_eq!(loaded.settings.store.password.expose(), "hunter2");
    let shown = show(&loaded);
    assert!(shown.contains("store.password: ********") && !shown.contains("hunter2"), "{shown}");
    assert!(!format!("{loaded:?}").contains("hunter2"));
}

#[test]
fn the_secrets_of_a_map_are_never_shown() {
    let loaded = from_environment(&[
        ("POSTRIDER_STORE__HEADERS__AUTHORIZATION", "hunter2"),
        ("POSTRIDER_STORE__PROPERTIES__SASL.PASSWORD", "hunter2"),
        ("POSTRIDER_STORE__PROPERTIES__LINGER.MS", "5"),
    ])
    .unwrap();
    assert_eq!(loaded.settings.store.headers["authorization"].expose(), "hunter2");
    let shown = show(&loaded);
    assert!(!shown.contains("hunter2") && shown.contains(r#""linger.ms":"5""#), "{shown}");
    let broken = from_environment(&[("POSTRIDER_STORE__HEADERS", r#"{"a":"hunter2""#)]).unwrap_err().to_string();
    assert!(!broken.contains("hunter2"), "{broken}");
}

#[test]
fn properties_that_are_credentials_are_never_shown() {
    let loaded = from_environment(&[
        ("POSTRIDER_STORE__PROPERTIES__SSL.KEY.PEM", "hunter2"),
        ("POSTRIDER_STORE__PROPERTIES__SASL.OAUTHBEARER.CONFIG", "hunter2"),
        ("POSTRIDER_STORE__PROPERTIES__SOME.URL", "https://u:hunter2@example.com"),
    ])
    .unwrap();
    let shown = format!("{}{:?}", show(&loaded), loaded.settings);
    assert!(!shown.contains("hunter2") && shown.contains("example.com"), "{shown}");
}

#[test]
fn secrets_of_maps_and_sections_are_read_from_files() {
    let (token, url) = (scratch("token", "hunter2\n"), scratch("url", "https://u:hunter3@example.com/a\n"));
    let (token, url) = (token.display(), url.display());
    let text = format!(
        "store:\n  headers: {{authorization: {{file: {token}}}, plain: text}}\n\
        routes:\n  - topic: a\n    target_file: {url}\n    headers: {{x: {{file: {token}}}}}\n"
    );
    let overrides = Overrides { file: Some(scratch("files.yaml", &text)), flags: Vec::new() };
    let loaded = load::<Settings>(&overrides, std::iter::empty()).unwrap();
    let Settings { store, routes, .. } = &loaded.settings;
    assert_eq!((store.headers["authorization"].expose(), store.headers["plain"].expose()), ("hunter2", "text"));
    assert_eq!(
        (routes[0].target.expose(), routes[0].headers["x"].expose()),
        ("https://u:hunter3@example.com/a", "hunter2")
    );
    let shown = format!("{}{:?}", show(&loaded), loaded.settings);
    assert!(!shown.contains("hunter") && shown.contains("https://********@example.com/********"), "{shown}");
}

#[test]
fn a_missing_file_named_in_a_map_or_a_section_is_named_in_the_error() {
    for json in [r#"[{"headers":{"x":{"file":"/no/such"}}}]"#, r#"[{"target_file":"/no/such"}]"#] {
        let error = from_environment(&[("POSTRIDER_ROUTES", json)]).unwrap_err().to_string();
        assert!(error.contains("/no/such") && error.contains("POSTRIDER_ROUTES"), "{error}");
    }
    for wrong in [r#"[{"headers":{"x":{"path":"hunter2"}}}]"#, r#"[{"headers":{"x":7}}]"#] {
        let error = from_environment(&[("POSTRIDER_ROUTES", wrong)]).unwrap_err().to_string();
        assert!(error.contains("{file: /path}") && !error.contains("hunter2"), "{error}");
    }
}

#[test]
fn the_table_shows_the_defaults_of_secrets_and_nothing_else_does() {
    assert!(markdown_table::<Settings>().contains("| `store.password` | secret | `changeme` |"));
    assert!(show(&from_environment(&[]).unwrap()).contains("store.password: ********"));
}

#[test]
fn a_list_of_sections_is_read_from_a_file_and_from_json() {
    let file = scratch("routes.yaml", "routes:\n  - topic: a\n    rate: 5\n  - topic: b\n    headers: {x: hunter2}\n");
    let loaded = load::<Settings>(&Overrides { file: Some(file), flags: Vec::new() }, std::iter::empty()).unwrap();
    let topics: Vec<_> = loaded.settings.routes.iter().map(|route| (route.topic.as_str(), route.rate)).collect();
    assert_eq!(topics, [("a", 5.0), ("b", 10.0)]);
    let shown = show(&loaded);
    assert!(shown.contains(r#""topic":"b""#) && !shown.contains("hunter2"), "{shown}");
    let loaded = from_environment(&[("POSTRIDER_ROUTES", r#"[{"topic":"c","mode":"thorough"}]"#)]).unwrap();
    assert_eq!((loaded.settings.routes[0].topic.as_str(), loaded.settings.routes[0].mode), ("c", Mode::Thorough));
}

#[test]
fn an_error_in_a_section_names_the_entry_and_the_key() {
    for (json, words) in [
        (r#"[{"topic":"a"},{"topik":"b"}]"#, ["entry 2", "unknown key `topik`", "`topic`"]),
        (r#"[{"rate":"fast"}]"#, ["entry 1", "`rate`", "a number"]),
        (r#"[{"mode":"slow"}]"#, ["entry 1", "`mode`", "one of quick, thorough"]),
        (r#"["a"]"#, ["entry 1", "not a section", "POSTRIDER_ROUTES"]),
        ("a,b", ["a list of sections", "JSON array", "POSTRIDER_ROUTES"]),
    ] {
        let error = from_environment(&[("POSTRIDER_ROUTES", json)]).unwrap_err().to_string();
        assert!(words.iter().all(|word| error.contains(word)), "{json}: {error}");
    }
}

#[test]
fn the_table_has_a_row_for_every_key() {
    let table = markdown_table::<Settings>();
    assert!(table.contains("| `store.mode` | quick \\| thorough | `quick` |"), "{table}");
    assert!(table.contains("| `routes[].rate` | number | `10.0` |"), "{table}");
    let rows = known_keys::<Settings>().iter().map(|key| 1 + key.items.len()).sum::<usize>();
    assert_eq!(table.lines().count(), 2 + rows);
}
