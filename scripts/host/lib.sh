# shellcheck shell=bash
# Shared by the scripts of a host: sourced by bash, never run.
#
#   JOBSVC_HOME (/opt/jobsvc)  releases/TAG/, one a release: its compose files and these scripts
#                              current -> releases/TAG, previous -> releases/TAG
#   JOBSVC_ETC (/etc/jobsvc)   stack.env, secrets/
#   JOBSVC_BACKUPS (/var/backups/jobsvc)

JOBSVC_HOME=${JOBSVC_HOME:-/opt/jobsvc}
JOBSVC_ETC=${JOBSVC_ETC:-/etc/jobsvc}
JOBSVC_BACKUPS=${JOBSVC_BACKUPS:-/var/backups/jobsvc}
export JOBSVC_TAG # of stack.env's variables the one that is not in it

say() { printf '%s\n' "$*" >&2; }

fail() {
    say "${0##*/}: $*"
    exit 1
}

need_tag() {
    [[ ${1:-} =~ ^[A-Za-z0-9][A-Za-z0-9._-]{0,127}$ ]] || fail "'${1:-}' is not a release"
}

# One at a time, of all that change what runs.
lock() {
    exec 9>"$JOBSVC_HOME/lock"
    flock --nonblock 9 || fail "another deploy, rollback, restore or rotation is under way"
}

# The release that a link of JOBSVC_HOME names; nothing where there is none.
release_of() {
    local target
    if target=$(readlink "$JOBSVC_HOME/$1"); then printf '%s\n' "${target##*/}"; fi
}

point() { # LINK TAG, in one step, so that there is always a current release
    ln -sfn "releases/$2" "$JOBSVC_HOME/$1.new"
    mv -T "$JOBSVC_HOME/$1.new" "$JOBSVC_HOME/$1"
}

# Compose on the current release. By the link's name, not the release's: what the containers have
# mounted from there keeps its path, so that a deploy does not start PostgreSQL anew.
# LIMIT, where it is set, is the number of seconds after which it is given up.
compose() {
    ${LIMIT:+timeout "$LIMIT"} docker compose --project-directory "$JOBSVC_HOME/current" --env-file "$JOBSVC_ETC/stack.env" \
        -f "$JOBSVC_HOME/current/docker-compose.yml" \
        -f "$JOBSVC_HOME/current/docker-compose.prod.yml" "$@"
}

# The value of a variable in stack.env.
setting() {
    sed -n "s/^$1=//p" "$JOBSVC_ETC/stack.env" | tail -n 1
}

# Needs nothing but the instance's role. Other registries: `docker login` once, by hand.
registry_login() {
    local registry region
    registry=$(setting JOBSVC_REGISTRY)
    registry=${registry%%/*}
    if [[ $registry =~ \.ecr\.([a-z0-9-]+)\.amazonaws\.com$ ]]; then
        region=${BASH_REMATCH[1]}
        aws ecr get-login-password --region "$region" |
            docker login --username AWS --password-stdin "$registry" >/dev/null
    fi
}

pull() { compose pull --quiet migrate server worker; }

# Servers and workers of the current release, on the database and the broker that run.
start_processes() {
    compose up --detach --no-deps --no-build --wait --wait-timeout 120 server worker
}

# By the network, from a container of its own: the server is healthy, and a job goes through
# submit, broker and worker to its result.
smoke() {
    LIMIT=60 compose run --rm --no-deps -T client healthcheck &&
        LIMIT=60 compose run --rm --no-deps -T client \
            run demo.echo "{\"release\": \"$JOBSVC_TAG\"}" --output json
}

# Makes TAG's servers and workers the ones that run, on the schema as it is.
activate() {
    JOBSVC_TAG=$1
    point current "$1" && start_processes && smoke
}
