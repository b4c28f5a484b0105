//! Parameters in the query, in a form, and in the path. Their errors name the parameter, say what
//! was found and what is wanted.

use std::{
    borrow::Cow,
    cell::{Cell, LazyCell},
    time::Duration,
};

use axum::{
    extract::{FromRequest, FromRequestParts, Path, Request, rejection::PathRejection},
    http::request::Parts,
};
use hyper::body::Body as _;
use percent_encoding::percent_decode;
use serde::{
    Deserialize, Deserializer,
    de::{
        DeserializeOwned, DeserializeSeed, IntoDeserializer, MapAccess, Visitor,
        value::{MapAccessDeserializer, SeqDeserializer, StrDeserializer},
    },
    forward_to_deserialize_any,
};

use super::{
    body::{self, Limits},
    code::Code,
    decode::{self, Fault, Flaw, Step, is_too_large, quoted, shortened},
    escapes::{self, broken_escape},
    problem::{Place, Problem},
    warning::{self, Source},
};

/// Extractor of the parameters in the query. Unknown ones are ignored, or refused if `T` has
/// `#[serde(deny_unknown_fields)]`.
pub struct Params<T>(pub T);

impl<T: DeserializeOwned, S: Sync> FromRequestParts<S> for Params<T> {
    type Rejection = Problem;

    async fn from_request_parts(parts: &mut Parts, _: &S) -> Result<Self, Problem> {
        from_query(parts.uri.query()).map(Self)
    }
}

/// Extractor for routes that delete what the path names: they take neither parameters nor a body,
/// since one that is ignored, such as that of a dry run, would delete what the caller wants to
/// keep.
pub struct Nothing;

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct NoFields {}

/// Limits of a body that should be empty. Some clients send `{}`.
const NO_BODY: Limits = Limits { max_bytes: 4 << 10, timeout: Duration::from_secs(5) };

impl<S: Sync> FromRequest<S> for Nothing {
    type Rejection = Problem;

    async fn from_request(request: Request, _: &S) -> Result<Self, Problem> {
        from_query::<NoFields>(request.uri().query())?;
        if !request.body().is_end_stream() {
            let body = body::read(request, NO_BODY).await?;
            if !body.is_empty() {
                decode::object::<NoFields>(&body)?;
            }
        }
        Ok(Self)
    }
}

/// Parses the parameters of a query.
pub fn from_query<T: DeserializeOwned>(query: Option<&str>) -> Result<T, Problem> {
    parse(query.unwrap_or_default().as_bytes(), Source::Parameter)
}

/// Parses the fields of an `application/x-www-form-urlencoded` body.
pub fn from_form<T: DeserializeOwned>(body: &[u8]) -> Result<T, Problem> {
    parse(body, Source::Field)
}

/// Returns a parameter of the path.
pub fn from_path(name: &str, path: Result<Path<String>, PathRejection>) -> Result<String, Problem> {
    let refused = |error: PathRejection| {
        let detail = match error.status().is_client_error() {
            true => format!("`{name}` must be UTF-8 after percent-decoding"),
            false => error.body_text(),
        };
        Problem::new(Code::INVALID_REQUEST, detail).at_parameter(name)
    };
    path.map(|Path(value)| value).map_err(refused)
}

/// Number of parameters up to which unknown ones are kept, to be named in a warning or an error.
const MAX_UNKNOWN: usize = 32;
/// Maximum number of values that are kept.
const MAX_PAIRS: usize = 32 << 10;

/// A parameter's name and value, decoded.
type Pair<'a> = (Cow<'a, str>, Cow<'a, str>);

fn parse<T: DeserializeOwned>(text: &[u8], source: Source) -> Result<T, Problem> {
    let known = decode::fields::<T>;
    let mut pairs = pairs(text, source, known)?;
    // Brings the values of a name together, in their order.
    pairs.sort_by(|one, other| one.0.cmp(&other.0));
    let mut unknown = Vec::new();
    let fields = Fields { pairs: &pairs, value: None, unknown: &mut unknown };
    let decoded = T::deserialize(MapAccessDeserializer::new(fields));
    if !unknown.is_empty() {
        let absent = |name: &&'static str| !pairs.iter().any(|(given, _)| given == *name);
        let absent: Vec<&'static str> = known().iter().copied().filter(absent).collect();
        warning::note(&mut warning::near_misses(source, unknown.into_iter(), &absent));
    }
    decoded.map_err(|fault| explain(&fault, source, known()))
}

/// Splits a query or form into names and values. Beyond a number of them, only those with known
/// names are kept, because a table of all of them could take many times the memory of their text.
fn pairs(text: &[u8], source: Source, known: fn() -> &'static [&'static str]) -> Result<Vec<Pair<'_>>, Problem> {
    let known = LazyCell::new(known);
    let mut pairs = Vec::new();
    for pair in text.split(|&byte| byte == b'&').filter(|pair| !pair.is_empty()) {
        let pair = pair_of(pair, source, &known)?;
        if pairs.len() < MAX_UNKNOWN || known.iter().any(|name| name.eq_ignore_ascii_case(&pair.0)) {
            pairs.push(pair);
        }
        if pairs.len() > MAX_PAIRS {
            let detail = format!("there are more than {MAX_PAIRS} values of {}s", source.word());
            return Err(Problem::new(Code::INVALID_REQUEST, detail));
        }
    }
    if source == Source::Field {
        name_as_known(&mut pairs, *known);
    }
    Ok(pairs)
}

/// Gives the fields of a form whose names differ from known ones only in case the known names,
/// unless the known name itself is there.
fn name_as_known(pairs: &mut [Pair<'_>], known: &'static [&'static str]) {
    for &name in known {
        if !pairs.iter().any(|(given, _)| given == name) {
            for (given, _) in pairs.iter_mut().filter(|(given, _)| name.eq_ignore_ascii_case(given)) {
                *given = Cow::Borrowed(name);
            }
        }
    }
}

fn pair_of<'a>(pair: &'a [u8], source: Source, known: &LazyCell<&'static [&'static str]>) -> Result<Pair<'a>, Problem> {
    let at = pair.iter().position(|&byte| byte == b'=');
    let (name, value) = at.map_or((pair, &[][..]), |at| (&pair[..at], &pair[at + 1..]));
    // Only what is known must be UTF-8.
    let name = decoded(name).unwrap_or_else(|| String::from_utf8_lossy(name).into_owned().into());
    // Clients send forms with a bare `%`, as browsers read them.
    let broken = if source == Source::Parameter { broken_escape(value) } else { None };
    if let (None, Some(value)) = (broken, decoded(value)) {
        return Ok((name, value));
    }
    if !known.iter().any(|known| known.eq_ignore_ascii_case(&name)) {
        return Ok((name, String::from_utf8_lossy(value)));
    }
    let rule = broken.map_or_else(|| "must be UTF-8 after percent-decoding".to_owned(), escapes::explain);
    let detail = format!("`{}` {rule}", shortened(&name));
    Err(Problem::new(Code::INVALID_REQUEST, detail).at(place(source, &name)))
}

fn decoded(text: &[u8]) -> Option<Cow<'_, str>> {
    if !text.contains(&b'+') {
        return percent_decode(text).decode_utf8().ok();
    }
    let spaced: Vec<u8> = text.iter().map(|&byte| if byte == b'+' { b' ' } else { byte }).collect();
    let decoded = percent_decode(&spaced).decode_utf8().ok()?;
    Some(decoded.into_owned().into())
}

fn place(source: Source, name: &str) -> Place {
    match source {
        Source::Parameter => Place::Parameter(shortened(name)),
        Source::Field => Place::Pointer(format!("#{}", decode::segment(name))),
    }
}

fn explain(fault: &Fault, source: Source, known: &[&'static str]) -> Problem {
    let name = fault.root().unwrap_or_default();
    let detail = match fault.flaw {
        Flaw::Unknown => decode::unknown_name(source.word(), name, known),
        _ => fault.to_string(),
    };
    Problem::new(decode::code(fault), detail).at(place(source, name))
}

/// Passes the values of each name on together.
struct Fields<'u, 'p, 'a> {
    /// Remaining values.
    pairs: &'p [Pair<'a>],
    value: Option<&'p [Pair<'a>]>,
    unknown: &'u mut Vec<&'p str>,
}

impl<'de> MapAccess<'de> for Fields<'_, '_, '_> {
    type Error = Fault;

    fn next_key_seed<K: DeserializeSeed<'de>>(&mut self, seed: K) -> Result<Option<K::Value>, Fault> {
        let Some((name, _)) = self.pairs.first() else { return Ok(None) };
        let count = self.pairs.iter().take_while(|(other, _)| other == name).count();
        let (value, rest) = self.pairs.split_at(count);
        (self.value, self.pairs) = (Some(value), rest);
        seed.deserialize(StrDeserializer::new(name)).map(Some)
    }

    fn next_value_seed<T: DeserializeSeed<'de>>(&mut self, seed: T) -> Result<T::Value, Fault> {
        let Some(values @ [(name, _), ..]) = self.value.take() else { return Err(Fault::new(Flaw::Missing)) };
        let ignored = Cell::new(false);
        let value = seed.deserialize(Values { values, ignored: &ignored });
        if ignored.get() {
            self.unknown.push(name);
        }
        value.map_err(|fault| fault.under(Step::Field(name.to_string())))
    }
}

/// The values of a name.
struct Values<'p, 'a> {
    values: &'p [Pair<'a>],
    ignored: &'p Cell<bool>,
}

impl Values<'_, '_> {
    fn only(&self) -> Result<&str, Fault> {
        match self.values {
            [(_, value)] => Ok(value),
            _ => Err(Fault::new(Flaw::Duplicate)),
        }
    }
}

macro_rules! integers {
    ($($method:ident)+) => {$(
        fn $method<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Fault> {
            let text = self.only()?;
            let visited = match (text.parse(), text.parse()) {
                (Ok(number), _) => visitor.visit_u64(number),
                (_, Ok(number)) => visitor.visit_i64(number),
                _ if is_too_large(text) => Err(Fault::of_value(&visitor)),
                _ => Err(Fault::of_type(&visitor)),
            };
            visited.map_err(|fault: Fault| fault.found(|| quoted(text)))
        }
    )+};
}

impl<'de> Deserializer<'de> for Values<'_, '_> {
    type Error = Fault;

    fn deserialize_any<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Fault> {
        let text = self.only()?;
        visitor.visit_str(text).map_err(|fault: Fault| fault.found(|| quoted(text)))
    }

    fn deserialize_ignored_any<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Fault> {
        self.ignored.set(true);
        visitor.visit_unit()
    }

    fn deserialize_bool<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Fault> {
        let text = self.only()?;
        match text.parse() {
            Ok(value) => visitor.visit_bool(value),
            Err(_) => Err(Fault::of_type(&visitor).found(|| quoted(text))),
        }
    }

    fn deserialize_f64<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Fault> {
        let text = self.only()?;
        match text.parse() {
            Ok(value) => visitor.visit_f64(value),
            Err(_) => Err(Fault::of_type(&visitor).found(|| quoted(text))),
        }
    }

    fn deserialize_option<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Fault> {
        visitor.visit_some(self)
    }

    fn deserialize_newtype_struct<V: Visitor<'de>>(self, _: &'static str, visitor: V) -> Result<V::Value, Fault> {
        visitor.visit_newtype_struct(self)
    }

    fn deserialize_seq<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Fault> {
        let texts = self.values.iter().map(|(_, value)| &**value);
        SeqDeserializer::new(texts).deserialize_any(visitor)
    }

    fn deserialize_enum<V: Visitor<'de>>(
        self,
        _: &'static str,
        _: &'static [&'static str],
        visitor: V,
    ) -> Result<V::Value, Fault> {
        let text = self.only()?;
        visitor.visit_enum(text.into_deserializer()).map_err(|fault: Fault| fault.found(|| quoted(text)))
    }

    integers! {
        deserialize_i8 deserialize_i16 deserialize_i32 deserialize_i64 deserialize_u8 deserialize_u16
        deserialize_u32 deserialize_u64
    }

    forward_to_deserialize_any! {
        i128 u128 f32 char str string bytes byte_buf unit unit_struct tuple tuple_struct map struct identifier
    }
}

#[cfg(test)]
mod tests;
