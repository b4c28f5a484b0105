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
        (
            "limit=1&cursor=10%",
            400,
            "cursor: `cursor` has the broken percent-encoding `%`; write a `%` itself as `%25`",
        ),
        ("ids=a&ids=%2gb", 400, "ids: `ids` has the broken percent-encoding `%2g`; write a `%` itself as `%25`"),
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
fn an_unknown_parameter_may_have_any_bytes() {
    let query = from_query::<Query>(Some("cursor=a&utm=%E4&%ff=1&x=+%ff&y=%&z%=%zz")).unwrap();
    assert_eq!(query.cursor.as_deref(), Some("a"));
    warning::take();
}

#[test]
fn field_names_of_a_form_differ_in_case_and_an_exact_one_wins() {
    let form = |text: &str| from_form::<Query>(text.as_bytes());
    assert_eq!(form("cursor=100%").unwrap().cursor.as_deref(), Some("100%"), "as browsers read it");
    assert_eq!(form("Cursor=a&IDS=1&ids_=2&Ids=3").unwrap().ids, ["1", "3"]);
    assert_eq!(form("Cursor=a&cursor=b&CURSOR=c").unwrap().cursor.as_deref(), Some("b"));
    assert_eq!(form("Cursor=a&CURSOR=c").unwrap_err().detail, "`cursor` must be given only once");
    warning::take();
}

#[test]
fn the_table_of_a_form_is_bounded() {
    let many = format!("{}cursor=k", "a&".repeat(1 << 19));
    assert_eq!(pairs(many.as_bytes(), Source::Field, decode::fields::<Query>).unwrap().len(), MAX_UNKNOWN + 1);
    assert_eq!(from_form::<Query>(many.as_bytes()).unwrap().cursor.as_deref(), Some("k"));
    let problem = from_form::<Query>("ids&".repeat(MAX_PAIRS + 1).as_bytes()).unwrap_err();
    assert_eq!(problem.detail, format!("there are more than {MAX_PAIRS} values of fields"));
    warning::take();
}

#[test]
fn a_form_names_its_fields_by_pointer() {
    let problem = from_form::<Query>(b"limit=0").unwrap_err();
    assert_eq!(problem.extensions["errors"][0]["pointer"], "#/limit");
}
