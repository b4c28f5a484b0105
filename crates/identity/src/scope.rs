//! Scopes: what a credential allows.

use std::{fmt, str::FromStr};

use super::pattern::{BadPattern, Pattern};

macro_rules! permissions {
    ($($name:ident $word:literal $allows:literal;)+) => {
        /// Permission that a scope gives. `TopicRead` and `TopicWrite` hold for topics that match a pattern.
        #[derive(Debug, Clone, Copy, PartialEq, Eq)]
        pub enum Permission {
            $(#[doc = $allows] $name,)+
        }

        impl Permission {
            pub const ALL: &'static [Self] = &[$(Self::$name),+];

            /// Returns the word of the scope, without a pattern.
            pub fn word(self) -> &'static str {
                match self {
                    $(Self::$name => $word,)+
                }
            }
        }
    };
}

permissions! {
    KvRead "kv:read" "Read every key.";
    KvWrite "kv:write" "Store and delete every key.";
    TopicRead "topic:read" "Read the records of topics that match the pattern.";
    TopicWrite "topic:write" "Produce records to topics that match the pattern.";
    CommentsRead "comments:read" "List and stream comments.";
    CommentsWrite "comments:write" "Write comments, as oneself.";
    MessagesRead "messages:read" "Receive, list and acknowledge one's own messages, and see who is connected.";
    MessagesWrite "messages:write" "Send messages, as oneself.";
    FeedRead "feed:read" "Read posts, follows, and one's own feed.";
    FeedWrite "feed:write" "Post, follow and unfollow, and delete one's own posts and account, as oneself.";
    Webhooks "webhooks" "Manage webhooks.";
    Metrics "metrics" "Read `/metrics` on the API listener.";
    Admin "admin" "Make and revoke keys; list, replay and purge dead letters.";
    ActForOthers "act-for-others" "Lets the other scopes act for any subject, not only for one's own.";
}

impl Permission {
    /// Returns whether its scope has a pattern of topics.
    pub fn takes_pattern(self) -> bool {
        matches!(self, Self::TopicRead | Self::TopicWrite)
    }

    /// Lists the forms of all scopes.
    pub fn forms() -> String {
        let form = |one: &Self| if one.takes_pattern() { format!("{one}:PATTERN") } else { one.to_string() };
        Self::ALL.iter().map(form).collect::<Vec<_>>().join(", ")
    }
}

impl fmt::Display for Permission {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.word())
    }
}

/// A scope of a credential.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Scope {
    pub permission: Permission,
    /// Topics for which it holds; set if and only if the permission takes one.
    pub pattern: Option<Pattern>,
}

/// Error of a text that is not a scope.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum BadScope {
    #[error("`{0}` is not a scope; there are {words}", words = Permission::forms())]
    Unknown(String),
    #[error("the scope `{0}` needs a pattern of topics, such as `{0}:orders.*`, or `{0}:*` for all")]
    NoPattern(Permission),
    #[error("the scope `{0}`: {1}")]
    Pattern(String, #[source] BadPattern),
}

impl Scope {
    /// Returns every permission, for all topics.
    pub fn all() -> Vec<Self> {
        let one = |&permission: &Permission| Self { permission, pattern: permission.takes_pattern().then(any_topic) };
        Permission::ALL.iter().map(one).collect()
    }
}

fn any_topic() -> Pattern {
    "*".parse().unwrap_or_else(|_| unreachable!("`*` is a pattern"))
}

impl FromStr for Scope {
    type Err = BadScope;

    fn from_str(text: &str) -> Result<Self, BadScope> {
        for &permission in Permission::ALL {
            let Some(rest) = text.strip_prefix(permission.word()) else { continue };
            match (permission.takes_pattern(), rest.strip_prefix(':')) {
                (false, None) if rest.is_empty() => return Ok(Self { permission, pattern: None }),
                (true, Some(pattern)) => {
                    let pattern = pattern.parse().map_err(|error| BadScope::Pattern(text.to_owned(), error))?;
                    return Ok(Self { permission, pattern: Some(pattern) });
                }
                (true, None) if rest.is_empty() => return Err(BadScope::NoPattern(permission)),
                _ => {}
            }
        }
        Err(BadScope::Unknown(text.chars().take(100).collect()))
    }
}

impl fmt::Display for Scope {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.pattern {
            Some(pattern) => write!(f, "{}:{pattern}", self.permission),
            None => write!(f, "{}", self.permission),
        }
    }
}

/// Error of a principal that lacks a scope.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("the credential lacks the scope `{scope}`")]
pub struct Missing {
    /// The scope that would allow it.
    pub scope: String,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_scope_is_read_back_as_written() {
        for scope in Scope::all() {
            assert_eq!(scope.to_string().parse::<Scope>(), Ok(scope));
        }
        let scope: Scope = "topic:write:{tenant}.orders-*".parse().unwrap();
        assert_eq!(
            (scope.permission, scope.to_string()),
            (Permission::TopicWrite, "topic:write:{tenant}.orders-*".into())
        );
    }

    #[test]
    fn other_texts_are_refused() {
        for text in ["", "kv", "kv:read:x", "KV:READ", "kv:read ", "topic:delete:x", "admin2", "topic:write2:*"] {
            assert_eq!(text.parse::<Scope>(), Err(BadScope::Unknown(text.to_owned())), "{text}");
        }
        assert_eq!("topic:read".parse::<Scope>(), Err(BadScope::NoPattern(Permission::TopicRead)));
        assert!(matches!("topic:read:".parse::<Scope>(), Err(BadScope::Pattern(_, BadPattern::Length(0)))));
    }
}
