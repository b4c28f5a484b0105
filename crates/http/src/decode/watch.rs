//! Counts the fields that a struct does not know while serde decodes it. That costs nothing for
//! other fields: only the decoding of a value that is ignored does more than without it.

use std::fmt;

use serde::{
    Deserializer,
    de::{DeserializeSeed, MapAccess, Visitor},
};

/// Defines a deserializer's methods as those of the inner one, in `self.inner`.
macro_rules! forward {
    ($($method:ident($($argument:ident: $kind:ty),*))+) => {$(
        #[inline]
        fn $method<V: Visitor<'de>>(self, $($argument: $kind,)* visitor: V) -> Result<V::Value, D::Error> {
            self.inner.$method($($argument,)* visitor)
        }
    )+};
    (most) => {
        forward! {
            deserialize_any() deserialize_bool() deserialize_i8() deserialize_i16() deserialize_i32()
            deserialize_i64() deserialize_i128() deserialize_u8() deserialize_u16() deserialize_u32()
            deserialize_u64() deserialize_u128() deserialize_f32() deserialize_f64() deserialize_char()
            deserialize_str() deserialize_string() deserialize_bytes() deserialize_byte_buf()
            deserialize_option() deserialize_unit() deserialize_unit_struct(name: &'static str)
            deserialize_newtype_struct(name: &'static str) deserialize_seq() deserialize_tuple(length: usize)
            deserialize_tuple_struct(name: &'static str, length: usize) deserialize_map()
            deserialize_enum(name: &'static str, variants: &'static [&'static str]) deserialize_identifier()
        }

        #[inline]
        fn is_human_readable(&self) -> bool {
            self.inner.is_human_readable()
        }
    };
}

/// Decodes a struct and counts its unknown fields.
pub struct Watch<'u, D> {
    pub inner: D,
    pub unknown: &'u mut usize,
}

impl<'de, D: Deserializer<'de>> Deserializer<'de> for Watch<'_, D> {
    type Error = D::Error;

    #[inline]
    fn deserialize_struct<V: Visitor<'de>>(
        self,
        name: &'static str,
        fields: &'static [&'static str],
        visitor: V,
    ) -> Result<V::Value, D::Error> {
        self.inner.deserialize_struct(name, fields, Watched { inner: visitor, unknown: self.unknown })
    }

    forward! { deserialize_ignored_any() }
    forward! { most }
}

/// A visitor, an access to fields, or the decoding of a value, with the count of unknown fields.
struct Watched<'u, T> {
    inner: T,
    unknown: &'u mut usize,
}

impl<'de, V: Visitor<'de>> Visitor<'de> for Watched<'_, V> {
    type Value = V::Value;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.inner.expecting(f)
    }

    #[inline]
    fn visit_map<M: MapAccess<'de>>(self, map: M) -> Result<V::Value, M::Error> {
        self.inner.visit_map(Watched { inner: map, unknown: self.unknown })
    }
}

impl<'de, M: MapAccess<'de>> MapAccess<'de> for Watched<'_, M> {
    type Error = M::Error;

    #[inline]
    fn next_key_seed<K: DeserializeSeed<'de>>(&mut self, seed: K) -> Result<Option<K::Value>, M::Error> {
        self.inner.next_key_seed(seed)
    }

    #[inline]
    fn next_value_seed<T: DeserializeSeed<'de>>(&mut self, seed: T) -> Result<T::Value, M::Error> {
        self.inner.next_value_seed(Watched { inner: seed, unknown: self.unknown })
    }

    #[inline]
    fn size_hint(&self) -> Option<usize> {
        self.inner.size_hint()
    }
}

impl<'de, T: DeserializeSeed<'de>> DeserializeSeed<'de> for Watched<'_, T> {
    type Value = T::Value;

    #[inline]
    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<T::Value, D::Error> {
        self.inner.deserialize(Value { inner: deserializer, unknown: self.unknown })
    }
}

/// The value of a field, which is unknown if it is ignored.
struct Value<'u, D> {
    inner: D,
    unknown: &'u mut usize,
}

impl<'de, D: Deserializer<'de>> Deserializer<'de> for Value<'_, D> {
    type Error = D::Error;

    #[inline]
    fn deserialize_ignored_any<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, D::Error> {
        *self.unknown += 1;
        self.inner.deserialize_ignored_any(visitor)
    }

    forward! { deserialize_struct(name: &'static str, fields: &'static [&'static str]) }
    forward! { most }
}
