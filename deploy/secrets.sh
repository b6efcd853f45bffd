#!/bin/sh
# Makes the passwords of the store's four users, and the certificates of a fleet, once.
#
#   sh deploy/secrets.sh                        for one host
#   sh deploy/secrets.sh store.example.com      for a fleet, whose machines reach the store under that name
#
# They lie in deploy/secrets (or where TORCHORD_SECRETS says), a folder of its owner's alone; docs/access.md says which
# file is whose. Containers read the files as users of their own, so the folder guards them and not their modes.
# No password is on a command line or in the environment of a process, here or later.
set -eu
umask 077

here=$(cd "$(dirname "$0")" && pwd)
folder=${TORCHORD_SECRETS:-$here/secrets}
host=${1:-}
if [ -e "$folder" ]; then
    echo "$folder is there already; delete it first if all of its passwords and certificates are to be made anew" >&2
    exit 1
fi
mkdir -p "$(dirname "$folder")"
new=$(mktemp -d "$folder.XXXXXX")
trap 'rm -rf "$new"' EXIT
tls="?ssl_cert_reqs=required&ssl_ca_certs=/run/secrets/ca.crt"
tls="$tls&ssl_certfile=/run/secrets/client.crt&ssl_keyfile=/run/secrets/client.key"

key() {  # NAME: a key and a request for a certificate of that name
    openssl req -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -subj "/CN=$1" \
        -keyout "$2.key" -out "$2.csr" 2>/dev/null
}

sign() {  # FILE, EXTENSIONS: what the fleet's authority makes of a request
    printf '%s\n' "$2" > "$new/extensions"
    openssl x509 -req -in "$1.csr" -CA "$new/ca.crt" -CAkey "$new/ca.key" -CAcreateserial -days 825 \
        -extfile "$new/extensions" -out "$1.crt" 2>/dev/null
    rm "$1.csr" "$new/extensions"
}

if [ -n "$host" ]; then
    openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 3650 -subj "/CN=torchord" \
        -addext keyUsage=critical,digitalSignature,keyCertSign -keyout "$new/ca.key" -out "$new/ca.crt" 2>/dev/null
    key "$host" "$new/store"
    sign "$new/store" "subjectAltName=DNS:$host
extendedKeyUsage=serverAuth"
fi

# `printf` and `read` are the shell's own: what they are given is on no command line.
while IFS= read -r line; do
    role=${line#user }
    role=${role%% *}
    if [ "$role" != default ]; then
        password=$(openssl rand -hex 32)
        hash=$(printf %s "$password" | openssl dgst -sha256 -r)
        line="$line #${hash%% *}"
        inside=store
        [ "$role" != submit ] || inside=localhost
        printf 'redis://%s:%s@%s:6379/0\n' "$role" "$password" "$inside" > "$new/$role.url"
        if [ -n "$host" ]; then
            mkdir -p "$new/fleet/$role"
            printf 'rediss://%s:%s@%s:6380/0%s\n' "$role" "$password" "$host" "$tls" > "$new/fleet/$role/$role.url"
            cp "$new/ca.crt" "$new/fleet/$role/"
            key "$role" "$new/fleet/$role/client"
            sign "$new/fleet/$role/client" "extendedKeyUsage=clientAuth"
        fi
    fi
    printf '%s\n' "$line" >> "$new/users.acl"
done < "$here/users.acl"

find "$new" -type f ! -name ca.key ! -name submit.url -exec chmod 644 {} +
mv "$new" "$folder"
trap - EXIT
echo "$folder"
