//! Merges the layers of the configuration: file, environment, flags. Each is checked against the
//! known keys.

use std::{collections::BTreeMap, fmt::Display, path::PathBuf};

use figment::{
    Figment,
    providers::{Format, Serialized, Yaml},
};
use schemars::JsonSchema;
use serde::{Serialize, de::DeserializeOwned};
use serde_json::{Map, Number, Value};

use super::{
    Error,
    keys::{Key, Kind, known_keys, nearest},
    suggestion,
};

/// Sources of settings besides the process's environment.
#[derive(Debug, Default, Clone)]
pub struct Overrides {
    /// File to read; if unset, `postrider.yaml` in the working directory, if it exists.
    pub file: Option<PathBuf>,
    /// `key=value` pairs from flags, each with the flag to name in an error.
    pub flags: Vec<(String, String, &'static str)>,
}

/// The merged settings, with the source of every key that is not at its default.
#[derive(Debug)]
pub struct Loaded<T> {
    pub settings: T,
    /// Dotted path → name of the source, such as `POSTRIDER_KAFKA__BROKERS` or `postrider.yaml`.
    pub sources: BTreeMap<String, String>,
}

/// Reason why a key cannot have a value. The text continues a sentence that names the key.
#[derive(Debug, thiserror::Error)]
pub enum ValueError {
    #[error("a section, so it needs keys below it")]
    IsSection,
    #[error("{found}, which is not {expected}")]
    Mismatch { found: String, expected: String },
    #[error("a list whose entry {entry} is not a section")]
    EntryIsNoSection { entry: usize },
    #[error("a list whose entry {entry} has an unknown key `{key}`{}", suggestion(.nearest, ""))]
    UnknownKey { entry: usize, key: String, nearest: Option<String> },
    #[error("a list; in its entry {entry}, `{key}` is {problem}")]
    InEntry {
        entry: usize,
        key: String,
        #[source]
        problem: Box<ValueError>,
    },
}

/// Reads and merges all layers. `environment` is usually `std::env::vars()`.
pub fn load<T>(overrides: &Overrides, environment: impl Iterator<Item = (String, String)>) -> Result<Loaded<T>, Error>
where
    T: Default + Serialize + DeserializeOwned + JsonSchema,
{
    let keys = known_keys::<T>();
    let mut layers = Layers { keys: &keys, values: Map::new(), sources: BTreeMap::new() };
    layers.add_file(overrides)?;
    layers.add_environment(environment)?;
    for (path, text, flag) in &overrides.flags {
        layers.put_text(path, text, flag)?;
    }
    // Extract from the checked values alone: serialized defaults would contain masked secrets, and
    // every settings type fills missing fields from its own `Default`.
    let settings = Figment::from(Serialized::defaults(Value::Object(layers.values))).extract().map_err(Box::new)?;
    Ok(Loaded { settings, sources: layers.sources })
}

struct Layers<'a> {
    keys: &'a [Key],
    values: Map<String, Value>,
    sources: BTreeMap<String, String>,
}

impl Layers<'_> {
    fn add_file(&mut self, overrides: &Overrides) -> Result<(), Error> {
        let default = PathBuf::from("postrider.yaml");
        let path = match &overrides.file {
            Some(path) => path,
            None if default.is_file() => &default,
            None => return Ok(()),
        };
        let origin = path.display().to_string();
        let text =
            std::fs::read_to_string(path).map_err(|source| Error::Unreadable { path: origin.clone(), source })?;
        let value: Value = match text.trim().is_empty() {
            true => Value::Object(Map::new()),
            false => Figment::from(Yaml::string(&text))
                .extract()
                .map_err(|error| Error::NotYaml { path: origin.clone(), source: Box::new(error) })?,
        };
        self.add_tree("", value, &origin)
    }

    /// Walks the tree of a file down to the known keys.
    fn add_tree(&mut self, path: &str, value: Value, origin: &str) -> Result<(), Error> {
        if let Some(key) = self.key(path) {
            return self.put(&key, value, origin);
        }
        match value {
            Value::Object(map) if path.is_empty() || self.is_section(path) => {
                for (name, child) in map {
                    let below = if path.is_empty() { name } else { format!("{path}.{name}") };
                    self.add_tree(&below, child, origin)?;
                }
                Ok(())
            }
            Value::Null if self.is_section(path) => Ok(()),
            Value::String(file) if self.secret_file(path).is_some() => self.put_file(path, &file, origin),
            _ if self.is_section(path) => {
                Err(Error::BadValue { key: path.to_owned(), origin: origin.to_owned(), problem: ValueError::IsSection })
            }
            _ => Err(self.unknown(path, origin)),
        }
    }

    fn add_environment(&mut self, environment: impl Iterator<Item = (String, String)>) -> Result<(), Error> {
        let mut variables: Vec<(String, String)> =
            environment.filter(|(name, _)| name.starts_with("POSTRIDER_")).collect();
        variables.sort();
        for (name, text) in variables {
            // Read by dev/stack and the command line; not settings.
            if matches!(name.as_str(), "POSTRIDER_CONFIG" | "POSTRIDER_STACK") {
                continue;
            }
            let path = name["POSTRIDER_".len()..].to_lowercase().replace("__", ".");
            self.put_text(&path, &text, &name)?;
        }
        Ok(())
    }

    fn put_text(&mut self, path: &str, text: &str, origin: &str) -> Result<(), Error> {
        if let Some(key) = self.key(path) {
            let value = from_text(&key, text).map_err(|problem| bad(&key, origin, problem))?;
            return self.put(&key, value, origin);
        }
        if self.secret_file(path).is_some() {
            return self.put_file(path, text, origin);
        }
        if let Some((map, name)) = self.map_entry(path) {
            let mut entries = self.get(&map).and_then(Value::as_object).cloned().unwrap_or_default();
            entries.insert(name, Value::String(text.to_owned()));
            insert(&mut self.values, &map, Value::Object(entries));
            self.sources.insert(map, origin.to_owned());
            return Ok(());
        }
        Err(self.unknown(path, origin))
    }

    /// Reads the secret of a `…_file` key from a mounted file, without the newline that editors
    /// append.
    fn put_file(&mut self, path: &str, file: &str, origin: &str) -> Result<(), Error> {
        let Some(key) = self.secret_file(path) else { return Err(self.unknown(path, origin)) };
        let value = from_file(file, origin)?;
        self.put(&key, value, &format!("{file} (named by {origin})"))
    }

    fn put(&mut self, key: &Key, mut value: Value, origin: &str) -> Result<(), Error> {
        read_files(key, &mut value, origin)?;
        check(key, &value).map_err(|problem| bad(key, origin, problem))?;
        if value.is_null() {
            return Ok(());
        }
        insert(&mut self.values, &key.path, value);
        self.sources.insert(key.path.clone(), origin.to_owned());
        Ok(())
    }

    fn key(&self, path: &str) -> Option<Key> {
        self.keys.iter().find(|key| key.path == path).cloned()
    }

    fn secret_file(&self, path: &str) -> Option<Key> {
        self.key(path.strip_suffix("_file")?).filter(|key| key.kind.has_file())
    }

    /// Splits `kafka.properties.linger.ms` into the map's path and the entry's name.
    fn map_entry(&self, path: &str) -> Option<(String, String)> {
        self.keys.iter().filter(|key| matches!(key.kind, Kind::Map | Kind::Secrets)).find_map(|key| {
            let name = path.strip_prefix(&key.path)?.strip_prefix('.')?;
            Some((key.path.clone(), name.to_owned()))
        })
    }

    fn is_section(&self, path: &str) -> bool {
        let prefix = format!("{path}.");
        self.keys.iter().any(|key| key.path.starts_with(&prefix))
    }

    fn get(&self, path: &str) -> Option<&Value> {
        let mut parts = path.split('.');
        let first = self.values.get(parts.next()?)?;
        parts.try_fold(first, |node, part| node.get(part))
    }

    fn unknown(&self, path: &str, origin: &str) -> Error {
        let nearest = nearest(self.keys.iter().map(|key| key.path.as_str()), path).map(str::to_owned);
        Error::UnknownKey { key: path.to_owned(), origin: origin.to_owned(), nearest }
    }
}

fn bad(key: &Key, origin: &str, problem: ValueError) -> Error {
    Error::BadValue { key: key.path.clone(), origin: origin.to_owned(), problem }
}

fn insert(values: &mut Map<String, Value>, path: &str, value: Value) {
    match path.split_once('.') {
        None => {
            values.insert(path.to_owned(), value);
        }
        Some((head, rest)) => {
            let child = values.entry(head).or_insert_with(|| Value::Object(Map::new()));
            if let Value::Object(map) = child {
                insert(map, rest, value);
            }
        }
    }
}

fn from_file(file: &str, origin: &str) -> Result<Value, Error> {
    let text = std::fs::read_to_string(file)
        .map_err(|source| Error::Unreadable { path: format!("{file} (named by {origin})"), source })?;
    Ok(Value::String(text.trim_end_matches(['\n', '\r']).to_owned()))
}

/// Replaces file names by the content of the files: each `{file: …}` in a map of secrets, and each
/// `…_file` in a list of sections.
fn read_files(key: &Key, value: &mut Value, origin: &str) -> Result<(), Error> {
    match (key.kind, value) {
        (Kind::Secrets, Value::Object(entries)) => {
            for secret in entries.values_mut() {
                let file = secret.as_object().filter(|one| one.len() == 1).and_then(|one| one.get("file"));
                if let Some(file) = file.and_then(Value::as_str) {
                    *secret = from_file(file, origin)?;
                }
            }
            Ok(())
        }
        (Kind::Sections, Value::Array(sections)) => sections
            .iter_mut()
            .filter_map(Value::as_object_mut)
            .try_for_each(|section| read_files_of_section(&key.items, section, origin)),
        _ => Ok(()),
    }
}

fn read_files_of_section(items: &[Key], section: &mut Map<String, Value>, origin: &str) -> Result<(), Error> {
    for item in items {
        let named = format!("{}_file", item.path);
        if item.kind.has_file()
            && let Some(file) = section.get(&named).and_then(Value::as_str)
        {
            let content = from_file(file, origin)?;
            section.remove(&named);
            section.insert(item.path.clone(), content);
        }
        if let Some(value) = section.get_mut(&item.path) {
            read_files(item, value, origin)?;
        }
    }
    Ok(())
}

fn from_text(key: &Key, text: &str) -> Result<Value, ValueError> {
    let parsed = match key.kind {
        Kind::String | Kind::Secret | Kind::Url => Some(Value::String(text.to_owned())),
        Kind::Integer => text.trim().parse::<i64>().ok().map(Value::from),
        Kind::Number => text.trim().parse::<f64>().ok().map(Value::from),
        Kind::Boolean => match text.trim().to_lowercase().as_str() {
            "true" | "1" | "yes" | "on" => Some(Value::Bool(true)),
            "false" | "0" | "no" | "off" => Some(Value::Bool(false)),
            _ => None,
        },
        Kind::List => Some(text.split(',').map(str::trim).filter(|item| !item.is_empty()).map(Value::from).collect()),
        Kind::Map | Kind::Secrets | Kind::Sections => serde_json::from_str(text).ok(),
    };
    let hidden = matches!(key.kind, Kind::Map | Kind::Secrets | Kind::Sections);
    parsed.ok_or_else(|| mismatch(key, hidden, text))
}

fn check(key: &Key, value: &Value) -> Result<(), ValueError> {
    if let (Kind::Sections, Value::Array(sections)) = (key.kind, value) {
        return sections.iter().enumerate().try_for_each(|(at, section)| check_section(key, at, section));
    }
    let fits = match (key.kind, value) {
        (_, Value::Null) => true,
        (Kind::String, Value::String(word)) => key.choices.is_empty() || key.choices.contains(word),
        (Kind::Secret | Kind::Url, Value::String(_))
        | (Kind::Boolean, Value::Bool(_))
        | (Kind::List, Value::Array(_)) => true,
        (Kind::Integer, Value::Number(number)) => (number.is_i64() || number.is_u64()) && is_within(key, number),
        (Kind::Number, Value::Number(number)) => is_within(key, number),
        (Kind::Map | Kind::Secrets, Value::Object(entries)) => entries.values().all(Value::is_string),
        _ => false,
    };
    // Maps may contain secrets.
    let hidden = matches!(key.kind, Kind::Secret | Kind::Url | Kind::Map | Kind::Secrets | Kind::Sections);
    if fits { Ok(()) } else { Err(mismatch(key, hidden, value)) }
}

fn mismatch(key: &Key, hidden: bool, value: impl Display) -> ValueError {
    let found = if hidden { "a value".to_owned() } else { format!("`{value}`") };
    ValueError::Mismatch { found, expected: expected(key) }
}

fn is_within(key: &Key, number: &Number) -> bool {
    number.as_f64().is_some_and(|number| {
        key.minimum.is_none_or(|minimum| number >= minimum) && key.maximum.is_none_or(|maximum| number <= maximum)
    })
}

/// Checks one entry of a list of sections. Errors give its number, counted from 1.
fn check_section(key: &Key, at: usize, section: &Value) -> Result<(), ValueError> {
    let entry = at + 1;
    let Value::Object(values) = section else { return Err(ValueError::EntryIsNoSection { entry }) };
    for (name, value) in values {
        let Some(item) = key.items.iter().find(|item| item.path == *name) else {
            let nearest = nearest(key.items.iter().map(|item| item.path.as_str()), name).map(str::to_owned);
            return Err(ValueError::UnknownKey { entry, key: name.clone(), nearest });
        };
        let in_entry = |problem| ValueError::InEntry { entry, key: name.clone(), problem: Box::new(problem) };
        check(item, value).map_err(in_entry)?;
    }
    Ok(())
}

fn expected(key: &Key) -> String {
    match key.kind {
        _ if !key.choices.is_empty() => format!("one of {}", key.choices.join(", ")),
        Kind::Integer => format!("a whole number{}", bounds(key)),
        Kind::Number => format!("a number{}", bounds(key)),
        Kind::List => "a list".to_owned(),
        Kind::Map => "a map of strings".to_owned(),
        Kind::Secrets => "a map of strings, each of which may be `{file: /path}` instead".to_owned(),
        Kind::Sections => "a list of sections (outside of a file: a JSON array of objects)".to_owned(),
        kind => format!("a {}", kind.name()),
    }
}

/// Returns the bounds of a number, to append to the name of its type.
fn bounds(key: &Key) -> String {
    match (key.minimum, key.maximum) {
        (Some(minimum), Some(maximum)) => format!(" between {minimum} and {maximum}"),
        (Some(minimum), None) => format!(" of {minimum} or more"),
        (None, Some(maximum)) => format!(" of {maximum} or less"),
        (None, None) => String::new(),
    }
}
