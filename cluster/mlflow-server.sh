#!/bin/sh
# MLflow's tracking server on PostgreSQL, for searches of many trials or for several users.
#
#   PGPASSWORD=... sh cluster/mlflow-server.sh postgresql://USER@HOST:5432/DATABASE ARTIFACT_DIR [PORT]
#
# Then, where runs and searches are started:  export MLFLOW_TRACKING_URI=http://127.0.0.1:5000
# The database must exist; its tables are made here. The password comes from PGPASSWORD or ~/.pgpass, never from the
# command line, where every user of the machine could read it. The server listens on this machine alone: let others in by
# a reverse proxy that asks who they are, or set MLFLOW_LISTEN_HOST and MLFLOW_SERVER_ALLOWED_HOSTS knowing that MLflow does not.
set -eu
if [ $# -lt 2 ]; then
    sed -n '2,5s/^# \{0,1\}//p' "$0" >&2
    exit 2
fi
case "$1" in
    *://*:*@* | *[?\&]password=*)
        echo "mlflow-server: leave the password out of the address and set PGPASSWORD" >&2
        exit 2
        ;;
    postgresql://* | postgresql+psycopg://*) ;;
    *)
        echo "mlflow-server: that is no PostgreSQL address; give postgresql://USER@HOST:5432/DATABASE" >&2
        exit 2
        ;;
esac
artifacts=$2
mkdir -p "$artifacts"
mlflow="$(dirname "$0")/../.venv/bin/mlflow"
[ -x "$mlflow" ] || mlflow=mlflow
MLFLOW_SERVER_ENABLE_JOB_EXECUTION=false
export MLFLOW_SERVER_ENABLE_JOB_EXECUTION
exec "$mlflow" server --backend-store-uri "$1" --artifacts-destination "$artifacts" \
    --host "${MLFLOW_LISTEN_HOST:-127.0.0.1}" --port "${3:-5000}" --workers "${MLFLOW_WORKERS:-4}"
