"""Make the user of the jobs on an MLflow server with passwords; there already is fine. Standard library alone.

    python infra/docker/make_mlflow_user.py

Reads MLFLOW_TRACKING_URI, MLFLOW_AUTH_ADMIN_PASSWORD, MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD.
"""

import base64
import json
import os
import sys
import urllib.error
import urllib.request


def make_user(uri: str, *, admin_password: str, name: str, password: str) -> None:
    """The user of the jobs, beside the administrator, who is `admin`.

    Raises:
        OSError: the server does not answer, or refuses.
    """
    login = base64.b64encode(f"admin:{admin_password}".encode()).decode()
    request = urllib.request.Request(
        f"{uri}/api/2.0/mlflow/users/create",
        headers={"Content-Type": "application/json", "Authorization": f"Basic {login}"},
        data=json.dumps({"username": name, "password": password}).encode(),
    )
    try:
        urllib.request.urlopen(request, timeout=30).close()
    except urllib.error.HTTPError as error:
        if json.loads(error.read() or b"{}").get("error_code") != "RESOURCE_ALREADY_EXISTS":
            raise


if __name__ == "__main__":
    told = {name: os.environ[f"MLFLOW_TRACKING_{name}"] for name in ("URI", "USERNAME", "PASSWORD")}
    make_user(
        told["URI"],
        admin_password=os.environ["MLFLOW_AUTH_ADMIN_PASSWORD"],
        name=told["USERNAME"],
        password=told["PASSWORD"],
    )
    print(f"MLflow user {told['USERNAME']} is there", file=sys.stderr)
