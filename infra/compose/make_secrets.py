"""Print passwords for the stack as lines of an env file; infra/kuberay takes the same names. Standard library alone.

(umask 077; python3 infra/compose/make_secrets.py > infra/compose/.env)
"""

import secrets

NAMES = (
    "POSTGRES_PASSWORD",
    "S3_ACCESS_KEY",
    "S3_SECRET_KEY",
    "MLFLOW_ADMIN_PASSWORD",
    "MLFLOW_TRACKING_PASSWORD",
    "MLFLOW_SECRET_KEY",
    "RAY_AUTH_TOKEN",
    "GRAFANA_PASSWORD",
)

if __name__ == "__main__":
    for name in NAMES:
        print(f"{name}={secrets.token_hex(20)}")
