//! The fields of an object that are known, or that an error or a warning may name.

use std::borrow::Cow;

use serde::{
    Deserializer,
    de::{DeserializeSeed, MapAccess, Visitor},
    forward_to_deserialize_any,
};
use serde_json::value::RawValue;

use super::{
    fault::{Fault, Flaw, Step},
    located,
};

/// Maximum number of unknown fields that are kept. The others are skipped, because a table of all
/// of them could take many times the memory of the body.
const MAX_UNKNOWN: usize = 32;

/// Fields of an object in their order, with their values as written.
#[derive(Default)]
pub struct Object<'a> {
    pub entries: Vec<Entry<'a>>,
    /// Number of unknown fields that were kept.
    unknown: usize,
    /// A known field that was given by its own name and by one that differs in case.
    pub doubled: Option<&'static str>,
}

/// A field as it was written.
pub struct Entry<'a> {
    pub name: Cow<'a, str>,
    pub value: &'a RawValue,
    /// Name under which the field is decoded, if it is another one.
    pub meant: Option<&'static str>,
}

/// The fields that were found for a known name.
#[derive(Default, Clone, Copy)]
struct Found {
    /// Number of those with the name itself.
    exact: usize,
    /// Place of the last one whose name differs in case.
    other: Option<usize>,
}

impl<'a> Object<'a> {
    /// Reads the fields. Fields whose names differ from known ones only in case get the known
    /// names: the last of several, and none if the known name itself is there. The others stay
    /// unknown. If nothing is known, as for a map, every field is kept.
    pub fn parse(text: &'a str, known: &'static [&'static str]) -> Result<Self, serde_json::Error> {
        let mut object = Self::default();
        let mut found = vec![Found::default(); known.len()];
        each_field(text, |name, value| object.add(Entry { name, value, meant: None }, known, &mut found))?;
        for (name, found) in known.iter().zip(found) {
            match (found.exact, found.other) {
                (0, Some(at)) => object.entries[at].meant = Some(name),
                (_, Some(_)) => object.doubled = Some(name),
                (_, None) => {}
            }
        }
        Ok(object)
    }

    fn add(&mut self, entry: Entry<'a>, known: &[&str], found: &mut [Found]) {
        if let Some(field) = known.iter().position(|name| *name == entry.name) {
            found[field].exact += 1;
            // Two are enough to see that there is more than one.
            if found[field].exact <= 2 {
                self.entries.push(entry);
            }
            return;
        }
        let is_full = self.unknown >= MAX_UNKNOWN && !known.is_empty();
        let Some(field) = known.iter().position(|name| is_same(name, &entry.name)) else {
            if !is_full {
                self.unknown += 1;
                self.entries.push(entry);
            }
            return;
        };
        match found[field].other {
            Some(earlier) if is_full => self.entries[earlier] = entry,
            earlier => {
                self.unknown += usize::from(earlier.is_some());
                found[field].other = Some(self.entries.len());
                self.entries.push(entry);
            }
        }
    }

    /// Returns whether a field was given a known name.
    pub fn is_renamed(&self) -> bool {
        self.entries.iter().any(|entry| entry.meant.is_some())
    }
}

/// Returns whether names differ at most in case, as the former services' decoder compared them: two
/// letters beyond ASCII are the same as ASCII ones in another case.
fn is_same(known: &str, name: &str) -> bool {
    if name.is_ascii() {
        return known.eq_ignore_ascii_case(name);
    }
    let folded = name.chars().map(|letter| match letter {
        '\u{17f}' => 's',
        '\u{212a}' => 'k',
        letter => letter.to_ascii_lowercase(),
    });
    folded.eq(known.chars().map(|letter| letter.to_ascii_lowercase()))
}

/// Passes on each field of an object, in their order.
pub fn each_field<'a>(text: &'a str, take: impl FnMut(Cow<'a, str>, &'a RawValue)) -> Result<(), serde_json::Error> {
    struct Each<F>(F);
    impl<'de, F: FnMut(Cow<'de, str>, &'de RawValue)> Visitor<'de> for Each<F> {
        type Value = ();

        fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
            f.write_str("an object")
        }

        fn visit_map<M: MapAccess<'de>>(mut self, mut map: M) -> Result<(), M::Error> {
            while let Some((located::Name(name), value)) = map.next_entry()? {
                (self.0)(name, value);
            }
            Ok(())
        }
    }
    let mut deserializer = serde_json::Deserializer::from_str(text);
    deserializer.deserialize_map(Each(take))?;
    deserializer.end()
}

/// Decodes the fields of an object.
impl<'de> Deserializer<'de> for Object<'de> {
    type Error = Fault;

    fn deserialize_any<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Fault> {
        visitor.visit_map(Fields { entries: self.entries.into_iter(), value: None })
    }

    fn deserialize_ignored_any<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Fault> {
        visitor.visit_unit()
    }

    forward_to_deserialize_any! {
        bool i8 i16 i32 i64 i128 u8 u16 u32 u64 u128 f32 f64 char str string bytes byte_buf option unit
        unit_struct newtype_struct seq tuple tuple_struct map struct enum identifier
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
        let key = located::key(&meant.map_or_else(|| name.clone(), Cow::Borrowed), seed);
        self.value = Some((name, value));
        key.map(Some)
    }

    fn next_value_seed<T: DeserializeSeed<'de>>(&mut self, seed: T) -> Result<T::Value, Fault> {
        let Some((name, value)) = self.value.take() else { return Err(Fault::new(Flaw::Missing)) };
        located::value(value, || Step::Field(name.into_owned()), seed)
    }
}
