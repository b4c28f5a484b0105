//! A second decoder of JSON, for bodies that the first one refuses: its errors have the place of the
//! value, and it takes the fields of an object under other names.

use std::borrow::Cow;

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

/// The fields of an object in their order, with their values as written.
pub struct Object<'a>(pub Vec<Entry<'a>>);

/// A field as it was written.
pub struct Entry<'a> {
    pub name: Cow<'a, str>,
    pub value: &'a RawValue,
    /// Name under which the field is decoded, if it is another one.
    pub meant: Option<&'static str>,
}

impl<'a> Object<'a> {
    /// Splits an object into its fields.
    pub fn parse(text: &'a str) -> Result<Self, serde_json::Error> {
        serde_json::from_str(text)
    }
}

#[derive(Deserialize)]
struct Name<'a>(#[serde(borrow)] Cow<'a, str>);

impl<'de: 'a, 'a> Deserialize<'de> for Object<'a> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Split;
        impl<'de> Visitor<'de> for Split {
            type Value = Vec<Entry<'de>>;

            fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.write_str("an object")
            }

            fn visit_map<M: MapAccess<'de>>(self, mut map: M) -> Result<Self::Value, M::Error> {
                let mut entries = Vec::new();
                while let Some((Name(name), value)) = map.next_entry()? {
                    entries.push(Entry { name, value, meant: None });
                }
                Ok(entries)
            }
        }
        deserializer.deserialize_map(Split).map(Object)
    }
}

/// Decodes the fields of an object.
impl<'de> Deserializer<'de> for Object<'de> {
    type Error = Fault;

    fn deserialize_any<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Fault> {
        visitor.visit_map(Fields { entries: self.0.into_iter(), value: None })
    }

    forward_to_deserialize_any! {
        bool i8 i16 i32 i64 i128 u8 u16 u32 u64 u128 f32 f64 char str string bytes byte_buf option unit
        unit_struct newtype_struct seq tuple tuple_struct map struct enum identifier ignored_any
    }
}

struct Fields<'de> {
    entries: std::vec::IntoIter<Entry<'de>>,
    value: Option<(Cow<'de, str>, &'de RawValue)>,
}

impl<'de> MapAccess<'de> for Fields<'de> {
    type Error = Fault;

    fn next_key_seed<K: DeserializeSeed<'de>>(&mut self, seed: K) -> Result<Option<K::Value>, Fault> {
        let Some(Entry { name, value, meant }) = self.entries.next() else { return Ok(None) };
        let key = match (meant, &name) {
            (Some(meant), _) => seed.deserialize(BorrowedStrDeserializer::new(meant)),
            (None, Cow::Borrowed(name)) => seed.deserialize(BorrowedStrDeserializer::new(name)),
            (None, Cow::Owned(name)) => seed.deserialize(StringDeserializer::new(name.clone())),
        };
        self.value = Some((name, value));
        key.map(Some)
    }

    fn next_value_seed<T: DeserializeSeed<'de>>(&mut self, seed: T) -> Result<T::Value, Fault> {
        let Some((name, value)) = self.value.take() else { return Err(Fault::new(Flaw::Missing)) };
        let decoded = seed.deserialize(Located(value));
        // Untagged enums refuse a value after it was read.
        decoded.map_err(|fault| fault.found(|| described(value)).under(Step::Field(name.into_owned())))
    }
}

struct Items<'de> {
    items: std::vec::IntoIter<&'de RawValue>,
    at: usize,
}

impl<'de> SeqAccess<'de> for Items<'de> {
    type Error = Fault;

    fn next_element_seed<T: DeserializeSeed<'de>>(&mut self, seed: T) -> Result<Option<T::Value>, Fault> {
        let Some(item) = self.items.next() else { return Ok(None) };
        let at = self.at;
        self.at += 1;
        let decoded = seed.deserialize(Located(item)).map(Some);
        decoded.map_err(|fault| fault.found(|| described(item)).under(Step::Item(at)))
    }
}

/// A value as it was written.
struct Located<'de>(&'de RawValue);

impl<'de> Located<'de> {
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
    let text = value.get();
    match text.as_bytes().first() {
        Some(b'"') => format!("the string {}", shortened(text)),
        Some(b'[') => "an array".to_owned(),
        Some(b'{') => "an object".to_owned(),
        _ => shortened(text),
    }
}

fn broken(error: serde_json::Error) -> Fault {
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
            Some(b'{') => Object::parse(text).map_err(broken)?.deserialize_any(visitor),
            Some(b'[') => {
                let items: Vec<&'de RawValue> = serde_json::from_str(text).map_err(broken)?;
                visitor.visit_seq(Items { items: items.into_iter(), at: 0 })
            }
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

    integers! { deserialize_i8 deserialize_i16 deserialize_i32 deserialize_i64 deserialize_u8 deserialize_u16 deserialize_u32 deserialize_u64 }

    forward_to_deserialize_any! {
        bool i128 u128 f32 f64 char str string bytes byte_buf unit unit_struct seq tuple tuple_struct map struct
        identifier ignored_any
    }
}
