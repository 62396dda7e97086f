"""What the documentation site needs beyond MkDocs: links that leave docs/, quoted code, and notebooks.

The pages are written for two readers, of the repository and of the site. In the repository a page may link to any
file; on the site such a file becomes a page below repository/. A comment `<!-- source: module.name -->` is invisible
in the repository; on the site the function's or class's code stands in its place, as it is now, without its docstring.
A notebook lies in the repository with its outputs, which the site shows; `python scripts/docs_hooks.py` runs it again.
"""

import ast
import base64
import json
import os
import re
import textwrap
from pathlib import Path
from typing import Any


ROOT = Path(__file__).resolve().parent.parent
LINK = re.compile(r"\]\(([^)\s#:]+)(#[^)\s]*)?\)")
PICTURES = (".png", ".svg")
DOCSTRING_TYPE = re.compile(r"<code>(`[^<]*)</code>")
QUOTE = re.compile(r"^( *)<!-- source: ([\w.]+) -->$", flags=re.MULTILINE)


def repository_path(src_uri: str) -> str:
    """Where a page of the site lies in the repository."""
    return src_uri.removeprefix("repository/") if src_uri.startswith("repository/") else f"docs/{src_uri}"


def site_path(path: str) -> str:
    """Where a file of the repository lies on the site: code on a page, a folder as its README, a picture as it is."""
    if path.startswith("docs/"):
        return path.removeprefix("docs/") + (".md" if path.endswith(".ipynb") else "")
    if (ROOT / path).is_dir():
        path += "/README.md"
    return f"repository/{path}" if path.endswith((".md", *PICTURES)) else f"repository/{path}.md"


def linked_path(target: str, page: str) -> str | None:
    """The file of the repository that a page's link means, if it is there."""
    path = os.path.normpath(Path(page).parent / target)
    return path if not path.startswith("..") and (ROOT / path).exists() else None


def relink(markdown: str, src_uri: str) -> str:
    """A page's links, as they lead on the site."""
    page = repository_path(src_uri)

    def replace(match: re.Match) -> str:
        path = linked_path(match[1], page)
        if path is None:
            return match[0]  # MkDocs then says what is wrong with it
        return f"]({os.path.relpath(site_path(path), Path(src_uri).parent)}{match[2] or ''})"

    return LINK.sub(replace, markdown)


def quoted(name: str) -> str:
    """The code of a function, class, method or constant of a module, as `package.module.name`, without its docstring.

    Raises:
        ValueError: there is no such module, or nothing of that name in it.
    """
    parts = name.split(".")
    length = next((n for n in range(len(parts), 0, -1) if ROOT.joinpath(*parts[:n]).with_suffix(".py").is_file()), 0)
    path = ROOT.joinpath(*parts[:length]).with_suffix(".py")
    source = path.read_text(encoding="utf-8") if length else ""
    node: Any = ast.parse(source)
    for part in parts[length:]:
        node = next((child for child in node.body if part in names_of(child)), None)
        if node is None:
            break
    if not length or node is None or isinstance(node, ast.Module):
        raise ValueError(
            f"source ({name}) names no function, class or constant of this repository; correct the comment"
        )
    lines = source.splitlines()
    first = min([node.lineno, *(decorator.lineno for decorator in getattr(node, "decorator_list", []))])
    left_out: set[int] = set()
    for inner in ast.walk(node):
        if isinstance(inner, ast.FunctionDef | ast.ClassDef) and ast.get_docstring(inner) and len(inner.body) > 1:
            left_out |= set(range(inner.body[0].lineno, inner.body[1].lineno))
    kept = [
        line for number, line in enumerate(lines[: node.end_lineno], 1) if number >= first and number not in left_out
    ]
    return textwrap.dedent("\n".join(kept))


def names_of(node: ast.AST) -> set[str]:
    """What a statement defines."""
    if isinstance(node, ast.Assign):
        return {target.id for target in node.targets if isinstance(target, ast.Name)}
    return {getattr(node, "name", "")}


def executed(text: str, folder: Path) -> dict[str, Any]:
    """A notebook with its outputs, run from top to bottom in a kernel of its own that starts in `folder`; without
    what went to stderr.

    Raises:
        nbclient.exceptions.CellExecutionError: a cell failed.
    """
    import nbformat
    from nbclient import NotebookClient

    notebook = nbformat.reads(text, as_version=4)
    NotebookClient(notebook, kernel_name="python3", resources={"metadata": {"path": str(folder)}}).execute()
    for cell in notebook["cells"]:
        cell["metadata"] = {}  # when each cell ran
        if cell["cell_type"] == "code":
            cell["outputs"] = [output for output in cell["outputs"] if output.get("name") != "stderr"]
    notebook["metadata"] = {"kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"}}
    return notebook


def notebook_page(notebook: dict[str, Any], name: str) -> tuple[str, dict[str, bytes]]:
    """A notebook as Markdown, and its pictures by their names."""
    parts, pictures = [], {}
    for cell in notebook["cells"]:
        source = "".join(cell["source"])
        parts.append(source if cell["cell_type"] == "markdown" else f"```python\n{source}\n```")
        printed = ""  # a kernel may send what a cell prints in several outputs
        for output in cell.get("outputs", []):
            picture = output.get("data", {}).get("image/png")
            if picture:
                path = f"{name}-{len(pictures) + 1}.png"
                pictures[path] = base64.b64decode("".join(picture))
                parts.append(f"![What the cell draws]({path})")
            else:
                printed += "".join(output.get("text") or output["data"]["text/plain"])
        if printed:
            parts.append(f"```text\n{printed.rstrip()}\n```")
    title, *rest = "\n\n".join(parts).split("\n", 1)
    return "\n".join([title, "", f"[Download this notebook]({name}.ipynb)", *rest]), pictures


def on_files(files: Any, config: Any) -> Any:
    """Adds a page for each notebook, and for each file outside docs/ that a page links to."""
    from mkdocs.structure.files import File, InclusionLevel

    for path in sorted((ROOT / "docs").glob("*.ipynb")):
        content, pictures = notebook_page(json.loads(path.read_text(encoding="utf-8")), path.stem)
        files.append(File.generated(config, f"{path.name}.md", content=content))
        for name, picture in pictures.items():
            files.append(File.generated(config, name, content=picture))
    waiting = list(files.documentation_pages())
    while waiting:
        page = waiting.pop()
        for target, _ in LINK.findall(page.content_string):
            path = linked_path(target, repository_path(page.src_uri))
            if path is None or path.startswith("docs/") or files.get_file_from_path(site_path(path)):
                continue
            source = ROOT / path / "README.md" if (ROOT / path).is_dir() else ROOT / path
            if source.suffix in PICTURES:
                files.append(File.generated(config, site_path(path), abs_src_path=str(source)))
                continue
            text = source.read_text(encoding="utf-8")
            if source.suffix != ".md":
                text = f"# {path}\n\n~~~~{source.suffix.lstrip('.')}\n{text}~~~~\n"
            added = File.generated(config, site_path(path), content=text, inclusion=InclusionLevel.NOT_IN_NAV)
            files.append(added)
            if source.suffix == ".md":
                waiting.append(added)
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Leads links to their pages, and puts the quoted code in."""
    if not (ROOT / repository_path(page.file.src_uri)).exists():  # a page made of code, above
        return markdown
    markdown = relink(markdown, page.file.src_uri)
    return QUOTE.sub(lambda match: textwrap.indent(f"```python\n{quoted(match[2])}\n```", match[1]), markdown)


def on_page_content(html: str, page: Any, config: Any, files: Any) -> str:
    """Renders the Markdown of transformers' kind of docstring, e.g. "`int`, *optional*, defaults to 1"."""

    def render(match: re.Match) -> str:
        return re.sub("`([^`]+)`", r"<code>\1</code>", match[1]).replace("*optional*", "<em>optional</em>")

    return DOCSTRING_TYPE.sub(render, html)


if __name__ == "__main__":
    import nbformat

    for path in sorted((ROOT / "docs").glob("*.ipynb")):
        nbformat.write(executed(path.read_text(encoding="utf-8"), ROOT), path)
