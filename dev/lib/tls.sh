# shellcheck shell=bash
# Certificates for --secure: of an authority, of a server (127.0.0.1 and localhost) and of a client.

tls_make() {
  local dir=$STATE/tls
  [[ -e $dir/complete ]] && return 0
  rm -rf "$dir"
  mkdir -p "$dir"
  chmod 700 "$dir"
  {
    tls_authority "$dir" '/CN=postrider dev CA'
    tls_issue "$dir" server '/CN=localhost' "subjectAltName=DNS:localhost,IP:127.0.0.1
extendedKeyUsage=serverAuth,clientAuth"
    tls_issue "$dir" client '/CN=postrider-client' 'extendedKeyUsage=clientAuth'
  } >"$dir/openssl.log" 2>&1 || {
    cat "$dir/openssl.log" >&2
    die "openssl could not create the certificates"
  }
  # The broker needs the key and the chain in one file.
  cat "$dir/server.key" "$dir/server.crt" "$dir/ca.crt" >"$dir/server.pem"
  : >"$dir/complete"
}

# tls_authority DIR SUBJECT
tls_authority() {
  openssl req -x509 -newkey rsa:2048 -nodes -days 3650 -sha256 -subj "$2" \
    -addext 'basicConstraints=critical,CA:TRUE' -addext 'keyUsage=critical,keyCertSign,cRLSign' \
    -keyout "$1/ca.key" -out "$1/ca.crt"
}

# tls_issue DIR NAME SUBJECT EXTENSIONS
tls_issue() {
  openssl genpkey -algorithm RSA -pkeyopt rsa_keygen_bits:2048 -out "$1/$2.key" &&
    openssl req -new -key "$1/$2.key" -subj "$3" -out "$1/$2.csr" &&
    openssl x509 -req -in "$1/$2.csr" -CA "$1/ca.crt" -CAkey "$1/ca.key" -CAcreateserial -days 3650 -sha256 \
      -extfile <(printf '%s\n' "$4") -out "$1/$2.crt"
}
