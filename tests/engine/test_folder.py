"""What ranks share: a file of rank 0's is waited for, and missed in words."""

import pytest
from engine import UserError, World, folder


def test_wait_for__a_file_that_comes_late_or_never(tmp_path, monkeypatch):
    path, slept = tmp_path / "files.json", []

    def sleep(seconds):
        slept.append(seconds)
        if len(slept) == 3:
            path.touch()

    monkeypatch.setattr(folder.time, "sleep", sleep)
    folder.wait_for(path, World("cpu", "fp32"))
    assert len(slept) == 3
    with pytest.raises(UserError, match="rank 0 does not see .*never: all nodes must share"):
        folder.wait_for(tmp_path / "never", World("cpu", "fp32"))
