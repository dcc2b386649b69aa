"""Runs the code of the documents while MkDocs builds them (a hook, see mkdocs.yml), and shows the pictures it makes.

The Python blocks of a page run in order, in a folder with nothing but the `trained` of the documents. What the page
shows as `![…](name.png)` is the file of that name which its blocks leave. A picture that no block leaves is missed by
MkDocs, as any other file would be; with `--strict` that is an error.
"""

import contextlib
import io
import re
import tempfile
import warnings
from functools import cache
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

BLOCK = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)
PICTURE = re.compile(r"!\[[^]]*\]\(([^/)]+\.png)\)")
TRAINED = "trained"  # the folder of adapters that pages use


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pictures of all pages to the site. Raises what `run_page` does, ValueError if two have the same name."""
    for page in files.documentation_pages():
        path = Path(config.docs_dir, page.src_uri)
        for name, content in run_page(path, path.read_text(encoding="utf-8")).items():
            if name in files:
                raise ValueError(f"{path}: there is a picture {name!r} already: give this one another name")
            files.append(File.generated(config, name, content=content))
    return files


@cache  # `mkdocs serve` runs a page again when it was changed
def run_page(path: Path, text: str) -> dict[str, bytes]:
    """Run the Python blocks of a page, and return the pictures that it shows and that they left, by name.

    Raises what they raise, and what they warn of; the traceback names the lines of the page.
    """
    names: dict[str, object] = {"__name__": "__main__"}
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        (folder / TRAINED).symlink_to(path.parent / TRAINED)
        stack.enter_context(contextlib.chdir(folder))
        stack.enter_context(contextlib.redirect_stdout(io.StringIO()))
        stack.enter_context(contextlib.redirect_stderr(io.StringIO()))
        stack.enter_context(warnings.catch_warnings(action="error"))
        for block in BLOCK.finditer(text):
            line = text.count("\n", 0, block.start(1))
            exec(compile("\n" * line + block[1], str(path), "exec"), names)
        shown = dict.fromkeys(PICTURE.findall(text))
        return {name: (folder / name).read_bytes() for name in shown if (folder / name).is_file()}
