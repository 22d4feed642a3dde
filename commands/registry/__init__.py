"""`xpert registry`: one command a file, over one `Registry`."""

from __future__ import annotations

import click

from xpert.commands.lazy import LazyCommands

__all__ = ["COMMANDS", "command"]

# name -> (module, help), in the order of a version's life.
COMMANDS: dict[str, tuple[str, str]] = {
    "publish": ("publish", "File an expert folder or a mixture as the next version of a name."),
    "import": ("import_adapter", "Publish a LoRA folder of peft, or an adapter of the Hugging Face Hub, as an expert."),
    "pull": ("pull", "Copy a version out, every file checked."),
    "export": ("export", "Write an expert for other programs: a LoRA folder, a merged model, a GGUF file."),
    "copy": ("copy_versions", "Copy versions into another registry, under their own numbers."),
    "list": ("list_names", "List all names with their latest version."),
    "show": ("show", "Show a version's card, skill profile and files."),
    "search": ("search", "Search names, descriptions and skills."),
    "skills": ("skills", "Show the tree of skills, or one skill and the experts that have it."),
    "site": ("web_pages", "Write the registry as a folder of web pages."),
    "gaps": ("gaps", "Name the next expert to build, by a server's request log."),
    "rank": ("rank", "Rank experts by their skill profiles, or by who beat whom."),
    "verify": ("verify", "Read every file and check it."),
    "tag": ("tag", "Move a tag, such as `stable`, to a version."),
    "untag": ("untag", "Take a tag away from a name."),
    "remove": ("remove", "Remove a version, or a name with all its versions."),
    "sign": ("sign", "Vouch for a version with your signature."),
    "keygen": ("keygen", "Make a key to sign versions with."),
    "trust": ("trust", "Say whose signatures count, and what must be signed."),
    "schema": ("schema", "Print the form of an expert's card."),
    "gc": ("collect", "Remove files that no version needs."),
    "rebuild": ("rebuild", "Make names and index again from the blobs."),
}


@click.group(
    cls=LazyCommands,
    table=COMMANDS,
    package="xpert.commands.registry",
    context_settings={"help_option_names": ["-h", "--help"]},
)
def command() -> None:
    """Publish, list, show, pull and verify experts and mixtures.

    NAME is OWNER/NAME; a version is asked for as OWNER/NAME@3, and is the latest where none is given.
    """
