//! Renders settings: the merged result, the schema, and the table in the docs.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::{
    keys::{Key, known_keys},
    layers::Loaded,
};

/// A key as it is shown to users: its value, masked if it is secret, and where the value came from.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Shown {
    pub key: String,
    pub value: Value,
    /// Name of the source, such as `POSTRIDER_KAFKA__BROKERS` or `postrider.yaml`.
    pub source: String,
}

/// Returns every key of the merged settings. Secrets are masked.
pub fn shown<T: JsonSchema + Serialize + Default>(loaded: &Loaded<T>) -> Vec<Shown> {
    let values = serde_json::to_value(&loaded.settings).unwrap_or(Value::Null);
    let one = |key: Key| {
        let value = key.path.split('.').try_fold(&values, |node, part| node.get(part)).unwrap_or(&Value::Null).clone();
        let source = loaded.sources.get(&key.path).map_or("default", String::as_str).to_owned();
        Shown { key: key.path, value, source }
    };
    known_keys::<T>().into_iter().map(one).collect()
}

/// Returns one line per key, with the source of each value.
pub fn lines(shown: &[Shown]) -> String {
    shown.iter().map(|Shown { key, value, source }| format!("{key}: {}  # {source}\n", plain(value))).collect()
}

/// Returns the merged settings, one key per line, with the source of each. Secrets are masked.
pub fn show<T: JsonSchema + Serialize + Default>(loaded: &Loaded<T>) -> String {
    lines(&shown(loaded))
}

/// Returns the JSON schema of the configuration file.
pub fn schema<T: JsonSchema>() -> String {
    let schema = schemars::schema_for!(T).to_value();
    serde_json::to_string_pretty(&schema).unwrap_or_default() + "\n"
}

/// Returns the configuration table of the docs, as Markdown.
pub fn markdown_table<T: JsonSchema + Serialize + Default>() -> String {
    let mut table = "| key | type | default | what it does |\n| --- | --- | --- | --- |\n".to_owned();
    for key in known_keys::<T>() {
        table.push_str(&row(&key.path, &key));
        for item in &key.items {
            table.push_str(&row(&format!("{}[].{}", key.path, item.path), item));
        }
    }
    table
}

fn row(path: &str, key: &Key) -> String {
    let kind = match key.choices.is_empty() {
        true => key.kind.name().to_owned(),
        false => key.choices.join(" \\| "),
    };
    let default = match &key.default {
        Value::Null => String::new(),
        value if plain(value).is_empty() => String::new(),
        value => format!("`{}`", plain(value)),
    };
    let text = key.description.replace('|', "\\|");
    format!("| `{path}` | {kind} | {default} | {text} |\n")
}

fn plain(value: &Value) -> String {
    match value {
        Value::String(text) => text.clone(),
        Value::Null => String::new(),
        Value::Object(map) if map.is_empty() => String::new(),
        Value::Array(items) => items.iter().map(plain).collect::<Vec<_>>().join(","),
        other => other.to_string(),
    }
}
