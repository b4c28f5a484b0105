//! A second decoder of JSON, for bodies that the first one refuses: its errors have the place of
//! the value.

use std::{borrow::Cow, fmt::Display};

use serde::{
    Deserialize, Deserializer,
    de::{
        DeserializeSeed, IntoDeserializer, MapAccess, SeqAccess, Visitor,
        value::{BorrowedStrDeserializer, StringDeserializer},
    },
    forward_to_deserialize_any,
};
use serde_json::value::RawValue;

use super::fault::{Fault, Flaw, Step, one_of, shortened};

/// A name or another string.
#[derive(Deserialize)]
pub struct Name<'a>(#[serde(borrow)] pub Cow<'a, str>);

/// Hands a name on.
pub fn key<'de, K: DeserializeSeed<'de>>(name: &Cow<'de, str>, seed: K) -> Result<K::Value, Fault> {
    match name {
        Cow::Borrowed(name) => seed.deserialize(BorrowedStrDeserializer::new(name)),
        Cow::Owned(name) => seed.deserialize(StringDeserializer::new(name.clone())),
    }
}

/// Decodes the value of a field or an item.
pub fn value<'de, T: DeserializeSeed<'de>>(
    value: &'de RawValue,
    step: impl FnOnce() -> Step,
    seed: T,
) -> Result<T::Value, Fault> {
    let decoded = seed.deserialize(Located(value));
    // Untagged enums refuse a value after it was read.
    decoded.map_err(|fault| fault.found(|| described(value)).under(step()))
}

/// Hands the fields of an object or the items of an array on while they are read, because a table
/// of them could take many times the memory of their text.
struct Inside<'o, V, T> {
    visitor: V,
    visited: &'o mut Option<Result<T, Fault>>,
}

impl<'de, V: Visitor<'de>> Visitor<'de> for Inside<'_, V, V::Value> {
    type Value = ();

    fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.visitor.expecting(f)
    }

    fn visit_map<M: MapAccess<'de>>(self, map: M) -> Result<(), M::Error> {
        *self.visited = Some(self.visitor.visit_map(Fields { map, name: None }));
        Ok(())
    }

    fn visit_seq<S: SeqAccess<'de>>(self, items: S) -> Result<(), S::Error> {
        *self.visited = Some(self.visitor.visit_seq(Items { items, at: 0 }));
        Ok(())
    }
}

struct Fields<'de, M> {
    map: M,
    name: Option<Cow<'de, str>>,
}

impl<'de, M: MapAccess<'de>> MapAccess<'de> for Fields<'de, M> {
    type Error = Fault;

    fn next_key_seed<K: DeserializeSeed<'de>>(&mut self, seed: K) -> Result<Option<K::Value>, Fault> {
        let Some(Name(name)) = self.map.next_key().map_err(broken)? else { return Ok(None) };
        key(self.name.insert(name), seed).map(Some)
    }

    fn next_value_seed<T: DeserializeSeed<'de>>(&mut self, seed: T) -> Result<T::Value, Fault> {
        let name = self.name.take().unwrap_or_default();
        value(self.map.next_value().map_err(broken)?, || Step::Field(name.into_owned()), seed)
    }
}

struct Items<S> {
    items: S,
    at: usize,
}

impl<'de, S: SeqAccess<'de>> SeqAccess<'de> for Items<S> {
    type Error = Fault;

    fn next_element_seed<T: DeserializeSeed<'de>>(&mut self, seed: T) -> Result<Option<T::Value>, Fault> {
        let Some(item) = self.items.next_element().map_err(broken)? else { return Ok(None) };
        let at = self.at;
        self.at += 1;
        value(item, || Step::Item(at), seed).map(Some)
    }
}

/// A value as it was written.
pub struct Located<'de>(pub &'de RawValue);

impl<'de> Located<'de> {
    fn inside<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Fault> {
        let mut visited = None;
        let read =
            serde_json::Deserializer::from_str(self.0.get()).deserialize_any(Inside { visitor, visited: &mut visited });
        // A fault in it ends the reading early, which is an error of the reader too.
        visited.unwrap_or_else(|| Err(read.map_or_else(broken, |()| Fault::new(Flaw::Missing))))
    }

    fn number<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Fault> {
        let text = self.0.get();
        if let Ok(number) = text.parse() {
            return visitor.visit_u64(number);
        }
        match text.parse() {
            Ok(number) => visitor.visit_i64(number),
            Err(_) => visitor.visit_f64(text.parse().unwrap_or(f64::INFINITY)),
        }
    }

    fn integer<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Fault> {
        match is_too_large(self.0.get()) {
            true => Err(Fault::of_value(&visitor).found(|| described(self.0))),
            false => self.deserialize_any(visitor),
        }
    }
}

/// Returns whether a text is a whole number that no integer type takes.
pub fn is_too_large(text: &str) -> bool {
    let digits = text.strip_prefix('-').unwrap_or(text);
    !digits.is_empty()
        && digits.bytes().all(|byte| byte.is_ascii_digit())
        && text.parse::<u64>().is_err()
        && text.parse::<i64>().is_err()
}

/// Describes a value in an error.
fn described(value: &RawValue) -> String {
    described_text(value.get())
}

/// Describes the value of a text, which need not be valid JSON, in an error.
pub fn described_text(text: &str) -> String {
    match text.as_bytes().first() {
        Some(b'"') => format!("the string {}", shortened(text)),
        Some(b'[') => "an array".to_owned(),
        Some(b'{') => "an object".to_owned(),
        _ => shortened(text),
    }
}

fn broken(error: impl Display) -> Fault {
    Fault::new(Flaw::Other(error.to_string()))
}

macro_rules! integers {
    ($($method:ident)+) => {$(
        fn $method<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Fault> {
            self.integer(visitor)
        }
    )+};
}

impl<'de> Deserializer<'de> for Located<'de> {
    type Error = Fault;

    fn deserialize_any<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Fault> {
        let (value, text) = (self.0, self.0.get());
        let visited = match text.as_bytes().first() {
            Some(b'"') => match serde_json::from_str::<Name<'de>>(text).map_err(broken)?.0 {
                Cow::Borrowed(text) => visitor.visit_borrowed_str(text),
                Cow::Owned(text) => visitor.visit_string(text),
            },
            Some(b'{' | b'[') => self.inside(visitor),
            Some(b't') => visitor.visit_bool(true),
            Some(b'f') => visitor.visit_bool(false),
            Some(b'n') => visitor.visit_unit(),
            _ => self.number(visitor),
        };
        visited.map_err(|fault| fault.found(|| described(value)))
    }

    fn deserialize_option<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Fault> {
        if self.0.get() == "null" { visitor.visit_none() } else { visitor.visit_some(self) }
    }

    fn deserialize_enum<V: Visitor<'de>>(
        self,
        _: &'static str,
        variants: &'static [&'static str],
        visitor: V,
    ) -> Result<V::Value, Fault> {
        let visited = match serde_json::from_str::<Name<'de>>(self.0.get()) {
            Ok(Name(variant)) => visitor.visit_enum(variant.into_deserializer()),
            Err(_) => Err(Fault::new(Flaw::Type { wanted: one_of(variants) })),
        };
        visited.map_err(|fault| fault.found(|| described(self.0)))
    }

    fn deserialize_newtype_struct<V: Visitor<'de>>(self, name: &'static str, visitor: V) -> Result<V::Value, Fault> {
        // The library hands a value over unparsed under a name of its own.
        if name.starts_with("$serde_json") {
            return self.0.deserialize_newtype_struct(name, visitor).map_err(broken);
        }
        visitor.visit_newtype_struct(self)
    }

    /// Skips the value, whose grammar was checked before.
    fn deserialize_ignored_any<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Fault> {
        visitor.visit_unit()
    }

    integers! { deserialize_i8 deserialize_i16 deserialize_i32 deserialize_i64 deserialize_u8 deserialize_u16 deserialize_u32 deserialize_u64 }

    forward_to_deserialize_any! {
        bool i128 u128 f32 f64 char str string bytes byte_buf unit unit_struct seq tuple tuple_struct map struct
        identifier
    }
}
