"""Who and what made a run."""

import os
import pwd

from adaconv.tracking import provenance


def test_a_user_without_a_name_is_told_by_number(monkeypatch):
    """`docker run --user 12345`: no entry in the container's list of users."""
    for name in ("LOGNAME", "USER", "LNAME", "USERNAME"):
        monkeypatch.delenv(name, raising=False)

    def unknown(uid):
        raise KeyError(f"getpwuid(): uid not found: {uid}")

    monkeypatch.setattr(pwd, "getpwuid", unknown)
    assert provenance.user() == f"uid {os.getuid()}"
