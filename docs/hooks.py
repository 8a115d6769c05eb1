"""What `benchmarks/results` holds becomes a part of the site, so that links to it work there as they do on GitHub."""

from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages and figures of the results."""
    for path in sorted(BENCHMARKS.glob("results/*")):
        if path.suffix in (".md", ".png"):
            name = path.relative_to(BENCHMARKS).as_posix()
            files.append(File(name, str(BENCHMARKS), config.site_dir, config.use_directory_urls))
    return files


def on_page_markdown(markdown: str, **_: object) -> str:
    """Point links at the added files."""
    return markdown.replace("](../benchmarks/results/", "](results/")
