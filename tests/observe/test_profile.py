"""How a profile ends with the run; what it says is in tests/test_train.py."""

from __future__ import annotations

from pathlib import Path

import pytest

from llmtrain.config import make_config
from llmtrain.engine import make_engine
from llmtrain.errors import Stopped
from llmtrain.health.peers import Peers
from llmtrain.observe.profile import Profiler, profiled


@pytest.mark.parametrize(
    ("error", "is_ended"),
    [
        (Stopped("a signal"), True),
        (KeyboardInterrupt(), True),
        (RuntimeError("[../third_party/gloo/gloo/transport/tcp/pair.cc:538] Connection closed by peer"), False),
    ],
)
def test_a_profile_is_ended_unless_a_rank_is_lost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException, is_ended: bool
) -> None:
    """To end one waits for the device, which may wait for the lost rank: that is to be named first."""
    ended: list[bool] = []
    monkeypatch.setattr(Profiler, "discard", lambda _: ended.append(True))
    config = make_config({"run": {"dir": str(tmp_path)}, "training": {"profile": {"start": 100}}})
    engine = make_engine(60.0)
    with Peers(engine) as peers:
        with pytest.raises(type(error)), profiled(config, engine, peers, print):
            assert peers.listener is not None
            raise error
        assert peers.listener is None
    engine.close()
    assert bool(ended) == is_ended
