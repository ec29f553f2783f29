"""What `open_page` promises: that nothing which goes wrong on a page stays unseen."""

from typing import Any

import pytest


@pytest.mark.parametrize("root", ["http"], indirect=True)
def test_what_goes_wrong_is_seen(open_page: Any, root: str) -> None:
    page = open_page("index.html")
    assert open_page.problems == []
    page.evaluate("console.error('broken')")
    page.evaluate("setTimeout(() => { throw new Error('thrown') })")
    page.evaluate("fetch('nowhere.js')")
    page.evaluate("fetch('http://127.0.0.1:9/outside').catch(() => {})")
    page.wait_for_function(
        "performance.getEntriesByType('resource').some((entry) => entry.name.endsWith('outside'))"
    )
    seen = open_page.problems[:]
    open_page.problems.clear()
    assert "console: broken" in seen
    assert "error: thrown" in seen
    assert f"404: {root}/nowhere.js" in seen
    assert "left the site: http://127.0.0.1:9/outside" in seen
    assert "failed: http://127.0.0.1:9/outside" in seen
