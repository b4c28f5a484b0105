//! Parameters in the query, in a form, and in the path. Their errors name the parameter, say what was
//! found and what is wanted.

use std::{borrow::Cow, cell::Cell, time::Duration};

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
    decode::{self, Fault, Flaw, Step, is_too_large, shortened},
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
/// since one that is ignored, such as that of a dry run, would delete what the caller wants to keep.
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

/// A parameter's name and value, decoded.
type Pair<'a> = (Cow<'a, str>, Cow<'a, str>);

fn parse<T: DeserializeOwned>(text: &[u8], source: Source) -> Result<T, Problem> {
    let (mut unknown, known) = (Vec::new(), decode::fields::<T>);
    let mut pairs = Vec::new();
    for pair in text.split(|&byte| byte == b'&').filter(|pair| !pair.is_empty()) {
        pairs.push(pair_of(pair, source)?);
    }
    // Brings the values of a name together, in their order.
    pairs.sort_by(|one, other| one.0.cmp(&other.0));
    let fields = Fields { pairs: &pairs, value: None, unknown: &mut unknown };
    let decoded = T::deserialize(MapAccessDeserializer::new(fields));
    if !unknown.is_empty() {
        let absent = |name: &&'static str| !pairs.iter().any(|(given, _)| given == *name);
        let absent: Vec<&'static str> = known().iter().copied().filter(absent).collect();
        warning::note(&mut warning::near_misses(source, unknown.into_iter(), &absent));
    }
    decoded.map_err(|fault| explain(&fault, source, known()))
}

fn pair_of(pair: &[u8], source: Source) -> Result<Pair<'_>, Problem> {
    let at = pair.iter().position(|&byte| byte == b'=');
    let (name, value) = at.map_or((pair, &[][..]), |at| (&pair[..at], &pair[at + 1..]));
    let name = decoded(name).ok_or_else(|| {
        let detail = format!("the names of {}s must be UTF-8 after percent-decoding", source.word());
        Problem::new(Code::INVALID_REQUEST, detail)
    })?;
    match decoded(value) {
        Some(value) => Ok((name, value)),
        None => {
            let detail = format!("`{}` must be UTF-8 after percent-decoding", shortened(&name));
            Err(Problem::new(Code::INVALID_REQUEST, detail).at(place(source, &name)))
        }
    }
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
        Source::Parameter => Place::Parameter(name.to_owned()),
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
    /// What is left.
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

/// Describes a value in an error.
fn described(value: &str) -> String {
    if value.is_empty() { "an empty value".to_owned() } else { format!("`{}`", shortened(value)) }
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
            visited.map_err(|fault: Fault| fault.found(|| described(text)))
        }
    )+};
}

impl<'de> Deserializer<'de> for Values<'_, '_> {
    type Error = Fault;

    fn deserialize_any<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Fault> {
        let text = self.only()?;
        visitor.visit_str(text).map_err(|fault: Fault| fault.found(|| described(text)))
    }

    fn deserialize_ignored_any<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Fault> {
        self.ignored.set(true);
        visitor.visit_unit()
    }

    fn deserialize_bool<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Fault> {
        let text = self.only()?;
        match text.parse() {
            Ok(value) => visitor.visit_bool(value),
            Err(_) => Err(Fault::of_type(&visitor).found(|| described(text))),
        }
    }

    fn deserialize_f64<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Fault> {
        let text = self.only()?;
        match text.parse() {
            Ok(value) => visitor.visit_f64(value),
            Err(_) => Err(Fault::of_type(&visitor).found(|| described(text))),
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
        visitor.visit_enum(text.into_deserializer()).map_err(|fault: Fault| fault.found(|| described(text)))
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
mod tests {
    use super::*;
    use crate::Bounded;

    #[derive(Debug, Deserialize, PartialEq)]
    #[serde(rename_all = "lowercase")]
    enum Kind {
        Events,
        Deliveries,
    }

    #[derive(Debug, Default, Deserialize, PartialEq)]
    #[serde(default)]
    struct Query {
        limit: Option<Bounded<1, 100>>,
        offset: Option<i64>,
        rate: Option<f64>,
        verbose: bool,
        kind: Option<Kind>,
        cursor: Option<String>,
        ids: Vec<String>,
    }

    fn refused(query: &str) -> (u16, String) {
        let problem = from_query::<Query>(Some(query)).unwrap_err();
        let errors = &problem.extensions["errors"];
        assert_eq!(errors[0]["detail"], problem.detail, "{query}");
        (problem.code.status.as_u16(), format!("{}: {}", errors[0]["parameter"].as_str().unwrap(), problem.detail))
    }

    #[test]
    fn parameters_are_decoded_and_may_repeat_where_a_list_is_wanted() {
        let query = "limit=100&ids=a%2Fb&offset=-1&rate=0.5&&ids=c+d&verbose=true&kind=events&cursor=%C3%A4&other=%20";
        let query: Query = from_query(Some(query)).unwrap();
        assert_eq!((query.limit.unwrap().get(), query.offset, query.rate), (100, Some(-1), Some(0.5)));
        assert_eq!((query.verbose, query.kind, query.cursor.as_deref()), (true, Some(Kind::Events), Some("ä")));
        assert_eq!(query.ids, ["a/b", "c d"]);
        assert_eq!(from_query::<Query>(None).unwrap(), Query::default());
        warning::take();
    }

    #[test]
    fn an_error_names_the_parameter_what_was_found_and_what_is_wanted() {
        for (query, status, expected) in [
            ("limit=0", 422, "limit: `limit` must be a whole number from 1 to 100 (got `0`)"),
            ("limit=-1", 422, "limit: `limit` must be a whole number from 1 to 100 (got `-1`)"),
            (
                "limit=99999999999999999999",
                422,
                "limit: `limit` must be a whole number from 1 to 100 (got `99999999999999999999`)",
            ),
            ("cursor=1&limit=ten", 400, "limit: `limit` must be a whole number from 1 to 100 (got `ten`)"),
            ("limit=", 400, "limit: `limit` must be a whole number from 1 to 100 (got an empty value)"),
            ("limit=1.5", 400, "limit: `limit` must be a whole number from 1 to 100 (got `1.5`)"),
            ("limit=1&limit=2", 400, "limit: `limit` must be given only once"),
            (
                "offset=x",
                400,
                "offset: `offset` must be a whole number from -9223372036854775808 to 9223372036854775807 (got `x`)",
            ),
            ("rate=x", 400, "rate: `rate` must be a number (got `x`)"),
            ("verbose=1", 400, "verbose: `verbose` must be `true` or `false` (got `1`)"),
            ("kind=all", 400, "kind: `kind` must be `events` or `deliveries` (got `all`)"),
            ("cursor=%ff", 400, "cursor: `cursor` must be UTF-8 after percent-decoding"),
        ] {
            assert_eq!(refused(query), (status, expected.to_owned()), "{query}");
        }
    }

    #[test]
    fn unknown_parameters_are_warned_of_or_refused() {
        from_query::<Query>(Some("Limit=7&other=1")).unwrap();
        let warnings: Vec<String> = warning::take().iter().map(ToString::to_string).collect();
        assert_eq!(warnings, ["unknown parameter `Limit`; did you mean `limit`?"]);

        #[derive(Debug, Deserialize)]
        #[serde(deny_unknown_fields)]
        struct Strict {
            #[serde(rename = "topic")]
            _topic: Option<String>,
        }
        let problem = from_query::<Strict>(Some("topik=a")).unwrap_err();
        assert_eq!(problem.detail, "unknown parameter `topik`; did you mean `topic`?");
        assert_eq!(problem.extensions["errors"][0]["parameter"], "topik");
    }

    #[test]
    fn many_parameters_take_no_more_than_linear_time() {
        let query: String = (0..20_000).map(|number| format!("p{number}=1&ids={number}&")).collect();
        assert_eq!(from_query::<Query>(Some(&query)).unwrap().ids.len(), 20_000);
        warning::take();
    }

    #[test]
    fn a_form_names_its_fields_by_pointer() {
        let problem = from_form::<Query>(b"limit=0").unwrap_err();
        assert_eq!(problem.extensions["errors"][0]["pointer"], "#/limit");
    }
}
