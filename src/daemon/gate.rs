//! The door for whoever comes over TCP: nobody passes without the token, and nobody may take his time.

use std::sync::Arc;
use std::time::Duration;

use aws_lc_rs::constant_time::verify_slices_are_equal;
use axum::extract::{Request, State};
use axum::http::header::{AUTHORIZATION, WWW_AUTHENTICATE};
use axum::http::{HeaderMap, StatusCode};
use axum::middleware::{Next, from_fn_with_state};
use axum::response::{IntoResponse, Response};
use axum::{Json, Router};
use sha2::{Digest, Sha256};

use crate::config::SecretText;
use crate::jobs::socket::Refusal;
use crate::model::Error;

/// As long as the slowest answer takes, and a little more.
const LONGEST: Duration = Duration::from_secs(75);

/// SHA-256 of the token: of equal length for all guesses, so that comparing takes equal time.
type TokenDigest = Arc<[u8; 32]>;

/// `api`, for whoever sends `Authorization: Bearer` with the token.
pub(super) fn guarded(api: Router, token: &SecretText) -> Router {
    let digest: TokenDigest = Arc::new(Sha256::digest(token.expose()).into());
    api.layer(from_fn_with_state(digest, admit))
}

async fn admit(State(digest): State<TokenDigest>, request: Request, next: Next) -> Response {
    if !knows(&digest, request.headers()) {
        tracing::warn!(path = request.uri().path(), "somebody without the token asked over TCP");
        let error = Error::refused("the token is missing or wrong");
        let refusal = Refusal::from(&error.hint("send Authorization: Bearer with what [daemon] token names"));
        return (StatusCode::UNAUTHORIZED, [(WWW_AUTHENTICATE, "Bearer")], Json(refusal)).into_response();
    }
    match tokio::time::timeout(LONGEST, next.run(request)).await {
        Ok(response) => response,
        Err(_) => StatusCode::REQUEST_TIMEOUT.into_response(),
    }
}

fn knows(digest: &TokenDigest, headers: &HeaderMap) -> bool {
    let given = headers.get(AUTHORIZATION).and_then(|value| value.as_bytes().strip_prefix(b"Bearer "));
    let given: [u8; 32] = Sha256::digest(given.unwrap_or_default()).into();
    verify_slices_are_equal(digest.as_slice(), &given).is_ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_whole_token_opens() {
        let digest: TokenDigest = Arc::new(Sha256::digest("sesame").into());
        let with = |value: &str| HeaderMap::from_iter([(AUTHORIZATION, value.parse().unwrap())]);
        assert!(knows(&digest, &with("Bearer sesame")));
        for wrong in ["Bearer", "Bearer ", "Bearer sesam", "Bearer sesame2", "bearer sesame", "Basic sesame", "sesame"]
        {
            assert!(!knows(&digest, &with(wrong)), "{wrong}");
        }
        assert!(!knows(&digest, &HeaderMap::new()));
    }
}
