"""What a composition has no use for is told."""

from __future__ import annotations

import pytest

from vislora.config.stack import ComposeConfig
from vislora.errors import ConfigError


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"method": "sum", "every": 2}, r"method 'sum' has no every; every is of: switch"),
        ({"method": "klora", "content": "a", "style": "b", "shares": {"a": 2.0}}, "shares is of: switch, composite"),
        ({"method": "composite", "every": 1, "shares": {"a": 2.0}}, "has no every"),
        ({"method": "klora", "by_prompt": True}, "has no by_prompt; by_prompt is of: switch, composite"),
        ({"method": "switch", "words": {"a": "ink"}}, "words are for by_prompt"),
        ({"method": "switch", "by_prompt": True, "shares": {"a": 2.0}}, "shares, not both"),
    ],
)
def test_settings_of_another_method_are_told(settings, said):
    with pytest.raises(ConfigError, match=said):
        ComposeConfig.of(settings)


def test_content_and_style_may_wait_for_a_sheet():
    assert ComposeConfig.of({"method": "switch", "content": "a", "style": "b"}).settings == {}
