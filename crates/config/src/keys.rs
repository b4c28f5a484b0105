//! Flat list of the known keys, derived from the JSON schema of the settings type.

use schemars::JsonSchema;
use serde::Serialize;
use serde_json::Value;

/// Kind of a key's value, as needed to parse it from a plain string.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    String,
    Secret,
    /// A URL that may contain credentials.
    Url,
    Integer,
    Number,
    Boolean,
    /// Strings; separated by commas in the environment.
    List,
    /// Sections of the same shape; a JSON array in the environment.
    Sections,
    /// Arbitrary string keys below this one, such as client properties.
    Map,
    /// Arbitrary string keys whose values are secrets, or names of files that contain them.
    Secrets,
}

impl Kind {
    /// Returns the word for messages and tables.
    pub fn name(self) -> &'static str {
        match self {
            Kind::String => "string",
            Kind::Secret => "secret",
            Kind::Url => "URL",
            Kind::Integer => "integer",
            Kind::Number => "number",
            Kind::Boolean => "boolean",
            Kind::List => "list",
            Kind::Sections => "list of sections",
            Kind::Map => "map",
            Kind::Secrets => "map of secrets",
        }
    }
}

/// One configuration key.
#[derive(Debug, Clone)]
pub struct Key {
    /// Dotted path, such as `kafka.brokers`.
    pub path: String,
    pub kind: Kind,
    /// Words that a choice accepts; empty for other kinds.
    pub choices: Vec<String>,
    /// Bounds of a number, inclusive.
    pub minimum: Option<f64>,
    pub maximum: Option<f64>,
    pub default: Value,
    /// Doc comment of the field.
    pub description: String,
    /// Keys of each section of a list of sections; empty for other kinds.
    pub items: Vec<Key>,
}

impl Kind {
    /// Returns whether a `…_file` key may name a file that contains the value.
    pub fn has_file(self) -> bool {
        matches!(self, Self::Secret | Self::Url)
    }
}

impl Key {
    /// Returns the environment variable that sets this key.
    pub fn variable(&self) -> String {
        format!("POSTRIDER_{}", self.path.replace('.', "__").to_uppercase())
    }
}

/// Returns all keys of a settings type, in the order of its fields.
pub fn known_keys<T: JsonSchema + Serialize + Default>() -> Vec<Key> {
    let schema = schemars::schema_for!(T).to_value();
    super::secret::DEFAULTS.set(true);
    let defaults = serde_json::to_value(T::default()).unwrap_or(Value::Null);
    super::secret::DEFAULTS.set(false);
    let mut keys = Vec::new();
    collect(&schema, &schema, "", &defaults, &mut keys);
    keys
}

fn collect(root: &Value, node: &Value, path: &str, default: &Value, keys: &mut Vec<Key>) {
    let resolved = resolve(root, node);
    if let Some(properties) = resolved.get("properties").and_then(Value::as_object) {
        for (name, child) in properties {
            let below = if path.is_empty() { name.clone() } else { format!("{path}.{name}") };
            collect(root, child, &below, default.get(name).unwrap_or(&Value::Null), keys);
        }
        return;
    }
    let items = items(root, resolved);
    keys.push(Key {
        path: path.to_owned(),
        kind: if items.is_empty() { kind(resolved) } else { Kind::Sections },
        choices: choices(resolved),
        minimum: resolved.get("minimum").and_then(Value::as_f64),
        maximum: maximum(resolved),
        default: default.clone(),
        description: description(node).or_else(|| description(resolved)).unwrap_or_default(),
        items,
    });
}

/// Returns the keys of the sections in an array; empty if it holds something else.
fn items(root: &Value, node: &Value) -> Vec<Key> {
    let mut keys = Vec::new();
    let Some(item) = node.get("items").map(|item| resolve(root, item)) else { return keys };
    if let Some(properties) = item.get("properties").and_then(Value::as_object) {
        for (name, child) in properties {
            collect(root, child, name, child.get("default").unwrap_or(&Value::Null), &mut keys);
        }
    }
    keys
}

/// Follows `$ref` and the non-null branch of an optional value.
fn resolve<'a>(root: &'a Value, node: &'a Value) -> &'a Value {
    if let Some(pointer) = node.get("$ref").and_then(Value::as_str) {
        let target = root.pointer(pointer.trim_start_matches('#')).unwrap_or(node);
        return if std::ptr::eq(target, node) { node } else { resolve(root, target) };
    }
    if let Some(options) = node.get("anyOf").and_then(Value::as_array)
        && let Some(some) = options.iter().find(|option| option.get("type").and_then(Value::as_str) != Some("null"))
    {
        return resolve(root, some);
    }
    node
}

fn kind(node: &Value) -> Kind {
    let types: Vec<&str> = match node.get("type") {
        Some(Value::String(one)) => vec![one.as_str()],
        Some(Value::Array(many)) => many.iter().filter_map(Value::as_str).collect(),
        _ => Vec::new(),
    };
    let is = |name: &str| types.contains(&name);
    let has_format = |name: &str| node.get("format").and_then(Value::as_str) == Some(name);
    match () {
        () if is("integer") => Kind::Integer,
        () if is("number") => Kind::Number,
        () if is("boolean") => Kind::Boolean,
        () if is("array") => Kind::List,
        () if is("object") && node.pointer("/additionalProperties/anyOf").is_some() => Kind::Secrets,
        () if is("object") => Kind::Map,
        () if has_format("password") => Kind::Secret,
        () if has_format("url") => Kind::Url,
        () => Kind::String,
    }
}

/// Returns the largest valid number. The schema gives that of 32-bit integers through the format
/// only.
fn maximum(node: &Value) -> Option<f64> {
    let of_format = || match node.get("format")?.as_str()? {
        "uint32" => Some(f64::from(u32::MAX)),
        "int32" => Some(f64::from(i32::MAX)),
        _ => None,
    };
    node.get("maximum").and_then(Value::as_f64).or_else(of_format)
}

fn choices(node: &Value) -> Vec<String> {
    let words = |values: &Vec<Value>| values.iter().filter_map(Value::as_str).map(str::to_owned).collect::<Vec<_>>();
    if let Some(values) = node.get("enum").and_then(Value::as_array) {
        return words(values);
    }
    node.get("oneOf")
        .and_then(Value::as_array)
        .map(|variants| {
            variants
                .iter()
                .flat_map(|variant| match (variant.get("const"), variant.get("enum").and_then(Value::as_array)) {
                    (Some(Value::String(word)), _) => vec![word.clone()],
                    (_, Some(values)) => words(values),
                    _ => Vec::new(),
                })
                .collect()
        })
        .unwrap_or_default()
}

fn description(node: &Value) -> Option<String> {
    node.get("description").and_then(Value::as_str).map(|text| text.split_whitespace().collect::<Vec<_>>().join(" "))
}

/// Returns the known name most similar to the given one, if it is similar enough for a typo.
pub fn nearest<'a>(known: impl IntoIterator<Item = &'a str>, wanted: &str) -> Option<&'a str> {
    let scores = known.into_iter().map(|name| (name, strsim::jaro_winkler(name, wanted)));
    let (best, score) = scores.max_by(|a, b| a.1.total_cmp(&b.1))?;
    // The measure is too strict for two letters that changed places in a short name.
    (score > 0.8 || (wanted.len() > 2 && strsim::osa_distance(best, wanted) == 1)).then_some(best)
}
