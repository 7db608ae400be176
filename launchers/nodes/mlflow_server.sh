#!/usr/bin/env bash
# Run an MLflow server on this machine, for good: a service of systemd at 127.0.0.1:5000, its
# database in ~/mlflow, artifacts below ARTIFACTS (a URI). A copy of the database lies there, too,
# made every five minutes and when the server stops: a new machine begins with it.
#
#   mlflow_server.sh s3://BUCKET/mlflow
set -euo pipefail
artifacts=${1:?where artifacts go, e.g. s3://BUCKET/mlflow}
checkout=$(cd "$(dirname "$0")/../.." && pwd)
python=$checkout/.venv/bin/python
database=$HOME/mlflow/mlflow.db
copy="$python -m launchers.nodes.mlflow_database"
mkdir -p "$HOME/mlflow"

sudo tee /etc/systemd/system/mlflow.service > /dev/null <<UNIT
[Unit]
Description=MLflow server of SBF-Dist
Wants=network-online.target
After=network-online.target
StartLimitIntervalSec=0

[Service]
User=$(id -un)
WorkingDirectory=$checkout
Environment=MLFLOW_DISABLE_TELEMETRY=true
ExecStartPre=$copy restore $database $artifacts/mlflow.db
ExecStart=$python -m mlflow server --host 127.0.0.1 --port 5000 --workers 2 \\
    --backend-store-uri sqlite:///$database --artifacts-destination $artifacts
ExecStopPost=$copy save $database $artifacts/mlflow.db
Restart=always
RestartSec=5
TimeoutStartSec=300
TimeoutStopSec=100

[Install]
WantedBy=multi-user.target
UNIT

sudo tee /etc/systemd/system/mlflow-copy.service > /dev/null <<UNIT
[Unit]
Description=A copy of the database of SBF-Dist's MLflow server

[Service]
Type=oneshot
User=$(id -un)
WorkingDirectory=$checkout
ExecStart=$copy save $database $artifacts/mlflow.db
UNIT

sudo tee /etc/systemd/system/mlflow-copy.timer > /dev/null <<UNIT
[Unit]
Description=Copies of the database of SBF-Dist's MLflow server

[Timer]
OnActiveSec=5min
OnUnitActiveSec=5min

[Install]
WantedBy=timers.target
UNIT

sudo systemctl daemon-reload
sudo systemctl enable mlflow.service
sudo systemctl restart mlflow.service
sudo systemctl enable --now mlflow-copy.timer
curl -sSf -o /dev/null --retry 60 --retry-delay 2 --retry-connrefused http://127.0.0.1:5000/health
