"""The examples in README and docs run as they stand, page by page, block after block, and make the pictures shown."""

from pathlib import Path

import pytest
from mkdocs.commands.build import build
from mkdocs.config import load_config
from mkdocs.exceptions import Abort

ROOT = Path(__file__).parent.parent
HOOK = ROOT / "scripts" / "pages.py"
MADE = "```python\nfrom PIL import Image\n\nImage.new('RGB', (2, 2), 'red').save('red.png')\n```\n"
SHOWN = "![A red square](red.png)\n"


def build_pages(folder: Path, **pages: str) -> Path:
    """The site of some pages."""
    for name, text in pages.items():
        path = folder / "docs" / f"{name}.md"
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
    config = folder / "mkdocs.yml"
    config.write_text(f"site_name: Pages\nhooks: ['{HOOK}']\n")
    build(load_config(str(config), strict=True))
    return folder / "site"


def test_the_site_builds_without_a_warning(tmp_path: Path) -> None:
    build(load_config(str(ROOT / "mkdocs.yml"), strict=True, site_dir=str(tmp_path)))
    assert (tmp_path / "index.html").is_file()


def test_the_readme_runs() -> None:
    readme = ROOT / "README.md"
    hook = load_config(str(ROOT / "mkdocs.yml")).hooks["scripts/pages.py"]
    hook.run_page(readme, readme.read_text())


def test_the_readme_is_short_enough_to_read() -> None:
    assert (ROOT / "README.md").read_text().count("\n") <= 150


def test_a_page_shows_the_picture_that_its_block_made(tmp_path: Path) -> None:
    site = build_pages(tmp_path, index=MADE + SHOWN)
    assert (site / "red.png").read_bytes().startswith(b"\x89PNG")
    assert 'src="red.png"' in (site / "index.html").read_text()
    assert not list(Path.cwd().glob("red.png"))


def test_a_picture_that_no_block_made_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(Abort, match="1 warning"):
        build_pages(tmp_path, index=MADE, other=SHOWN)


def test_a_picture_that_two_pages_make_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"other\.md: there is a picture 'red\.png' already"):
        build_pages(tmp_path, index=MADE + SHOWN, other=MADE + SHOWN)


def test_a_block_that_fails_is_an_error_at_its_line(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError) as caught:
        build_pages(tmp_path, index="# Title\n\n```python\nx = 0\n```\n\n```python\n1 / x\n```\n")
    assert (caught.traceback[-1].path.name, caught.traceback[-1].lineno + 1) == ("index.md", 8)


def test_a_block_that_warns_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(UserWarning, match="careful"):
        build_pages(tmp_path, index="```python\nimport warnings\nwarnings.warn('careful')\n```\n")
