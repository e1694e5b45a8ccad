"""Sources: urls, braces, globs and manifests of the data flags turned into shards with known counts."""

from __future__ import annotations

import logging
import os
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cached_property

from open_lm import storage
from open_lm.data.cache import BlockCache
from open_lm.data.cache_folder import open_cache
from open_lm.data.config import DataConfig
from open_lm.data.flat import open_flat
from open_lm.data.manifest import FILENAME, Shard, content_fingerprint, fingerprint, read_manifest
from open_lm.data.shards import index_file, layout_of, shard_name
from open_lm.errors import ConfigError, DataError, StorageError

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Source:
    """Shards that are mixed as one; `factor` is the sampling multiplier relative to its size."""

    name: str
    shards: tuple[Shard, ...]
    factor: float = 1.0

    @cached_property
    def n_sequences(self) -> int:
        return sum(shard.n_sequences for shard in self.shards)

    @cached_property
    def fingerprint(self) -> str:
        return fingerprint(self.shards)

    @cached_property
    def content_fingerprint(self) -> str | None:
        return content_fingerprint(self.shards)


@dataclass(frozen=True)
class Opening:
    """Needs of the run that opens sources: samples of `sample_tokens` ids below `vocab_size`, into which flat arrays
    are cut, for `world_size` ranks that share a cache."""

    config: DataConfig
    vocab_size: int = 0
    sample_tokens: int = 0
    world_size: int = 1

    @cached_property
    def cache(self) -> BlockCache:
        """The run's block cache, where what is looked at now need not be fetched again."""
        return open_cache(self.config.data_cache, self.config.data_cache_gb, world_size=self.world_size)


def _require_files(manifests: Sequence[str]) -> None:
    """Raise ConfigError where a local manifest is a folder or is not there."""
    for url in manifests:
        path = storage.local_path(url)
        if not storage.is_remote(url) and not path.is_file():
            inside = path / FILENAME
            found = "is a folder" if path.is_dir() else "no such file"
            advice = f"Give {inside}." if inside.is_file() else "Make it with `openlm manifest`, or correct the path."
            raise ConfigError(f"--dataset-manifest {storage.shown(url)}: {found}. {advice}")


def open_sources(
    config: DataConfig, *, vocab_size: int = 0, sample_tokens: int = 0, world_size: int = 1, form: str | None = None
) -> list[Source]:
    """The sources the flags name, of samples of that `form`. Without weights or factors they are pooled into one. See
    `Opening`.

    Raises:
        DataError: a manifest or shard is damaged, or a source holds no samples.
        StorageError: something does not exist.
        ConfigError: no data was named, or they are of another form.
    """
    if not (config.train_data or config.dataset_manifest):
        raise ConfigError("--train-data or --dataset-manifest: neither was given. Name the training shards.")
    opening = Opening(config, vocab_size, sample_tokens, world_size)
    if config.dataset_manifest:
        _require_files(config.dataset_manifest)
        sources = [Source(storage.shown(url), tuple(read_manifest(url))) for url in config.dataset_manifest]
    elif config.train_data_upsampling_factors:
        sources = _parts_with_factors(opening)
    else:
        sources = [_open(opening, value) for value in config.train_data]
    for source in sources:
        check_shards_are_there(source, opening)
        if not source.n_sequences:
            raise DataError(f"source {source.name}: holds no sequences. Check the path.")
    weighted = config.train_data_mix_weights or config.train_data_upsampling_factors
    sources = sources if weighted or len(sources) == 1 else [_pooled(sources)]
    if form is not None:
        require_form(sources, form)
    return sources


def named_tokenizer(sources: Sequence[Source]) -> str | None:
    """The tokenizer that the manifests of `sources` name; None when they name none, or if they disagree (logged)."""
    names = {shard.tokenizer for source in sources for shard in source.shards} - {None}
    if len(names) > 1:
        log.warning(
            "the manifests name %d tokenizers (%s): give --tokenizer.", len(names), ", ".join(sorted(map(str, names)))
        )
    return names.pop() if len(names) == 1 else None


def document_end(config: DataConfig, sources: Sequence[Source]) -> int | None:
    """The id after which a new document begins; None without --doc-mask.

    Raises:
        ConfigError: the manifests name several.
    """
    if not config.doc_mask or config.doc_mask_token is not None:
        return config.doc_mask_token
    named = {shard.eot_id for source in sources for shard in source.shards if shard.eot_id is not None}
    if len(named) > 1:
        raise ConfigError(
            f"--doc-mask: the manifests name several ends of text, {sorted(named)}. Give --doc-mask-token."
        )
    return named.pop() if named else 0


def require_form(sources: list[Source], form: str) -> None:
    """Refuse samples of another form than the task trains on.

    Raises:
        ConfigError: a manifest states another one.
    """
    for shard in (shard for source in sources for shard in source.shards):
        if shard.form != form:
            raise ConfigError(
                f"shard {shard.name} holds {shard.form}, --task needs {form}. Name data made for this task."
            )


def check_shards_are_there(source: Source, opening: Opening) -> None:
    """Check that all local shards (and a sample of remote ones) exist and have the size their manifest gives.

    Raises:
        StorageError: a shard is missing.
        DataError: a shard has another size.
    """
    remote = [shard for shard in source.shards if storage.is_remote(shard.url)]
    spread = remote[:: max(1, len(remote) // 64)][:64]
    for shard in source.shards:
        if not storage.is_remote(shard.url):
            _check_size(shard, storage.size_bytes(shard.url))
    if spread:
        with ThreadPoolExecutor(16) as pool:
            for shard, size in zip(spread, pool.map(opening.cache.size_bytes, spread), strict=True):
                _check_size(shard, size)


def _check_size(shard: Shard, size: int) -> None:
    if shard.size_bytes not in (None, size):
        raise DataError(
            f"shard {storage.shown(shard.url)}: {size} bytes, its manifest says {shard.size_bytes}. "
            "Copy it again, or make the manifest again."
        )


def _open(opening: Opening, value: str) -> Source:
    config = opening.config
    is_flat = config.dataset_type == "auto" and all(part.endswith(".npy") for part in value.split("::"))
    if config.dataset_type != "npy" and not is_flat:
        return open_source(value, config.data_key, opening)
    urls = [url for part in value.split("::") for url in expand(part)]
    sizes = {"vocab_size": opening.vocab_size, "sample_tokens": opening.sample_tokens}
    flat = [open_flat(url, **sizes, documents=config.doc_mask and config.doc_mask_token is None) for url in urls]
    shards = [shard._replace(name=name) for shard, name in zip(flat, _names(urls), strict=True)]
    return Source(storage.shown(value), tuple(shards))


def _parts_with_factors(opening: Opening) -> list[Source]:
    config = opening.config
    parts = [part for value in config.train_data for part in value.split("::")]
    texts = str(config.train_data_upsampling_factors).split("::")
    try:
        factors = [float(text) for text in texts]
    except ValueError:
        factors = []
    if len(factors) != len(parts) or min(factors) <= 0:
        raise ConfigError(
            f"--train-data-upsampling-factors {config.train_data_upsampling_factors}: need one number above 0 "
            f"for each of the {len(parts)} parts of --train-data, joined by `::`."
        )
    sources = [_open(opening, part) for part in parts]
    return [replace(source, factor=factor) for source, factor in zip(sources, factors, strict=True)]


def _pooled(sources: Sequence[Source]) -> Source:
    """All sources as one; a shard keeps its source's number in its name, so equal names do not clash."""
    total = sum(source.n_sequences for source in sources)
    counted = ", ".join(f"{source.name} {source.n_sequences / total:.0%}" for source in sources)
    log.info("no weights: each source counts by its size (%s); OpenLM gives equal shares.", counted)
    shards = [shard._replace(name=f"{k}/{shard.name}") for k, source in enumerate(sources) for shard in source.shards]
    return Source(" + ".join(source.name for source in sources), tuple(shards))


def open_source(value: str, key: str = "auto", opening: Opening | None = None) -> Source:
    """The shards one --train-data or --val-data value means: `::` joins urls, each with braces or a glob.

    Counts come from a manifest.jsonl beside the shards where it names them all, else from the shards' headers.
    """
    urls = [url for part in value.split("::") for url in expand(part)]
    if len(set(urls)) < len(urls):
        twice = next(url for url, n in Counter(urls).items() if n > 1)
        raise DataError(
            f"{value}: names {storage.shown(twice)} twice. Use --train-data-upsampling-factors to repeat data."
        )
    names = _names(urls)
    listed = {folder: _manifest_beside(folder) for folder in dict.fromkeys(storage.parent(url) for url in urls)}
    known = [listed[storage.parent(url)].get(shard_name(url)) for url in urls]
    counted = _count([url for url, shard in zip(urls, known, strict=True) if shard is None], key, opening)
    shards = [
        (shard or counted[url])._replace(name=name, url=url)
        for url, name, shard in zip(urls, names, known, strict=True)
    ]
    return Source(storage.shown(value), tuple(shards))


def _count(urls: list[str], key: str, opening: Opening | None) -> dict[str, Shard]:
    """Shards without a manifest, by their headers. What is fetched for that stays in the block cache."""
    remote = [url for url in urls if storage.is_remote(url)]
    cache = (opening or Opening(DataConfig())).cache if remote else None
    if remote:
        log.warning(
            "%s, …: no manifest, so the headers of %d remote shards are read first. `openlm manifest` "
            "saves this.", storage.shown(remote[0]), len(remote),
        )  # fmt: skip
    with ThreadPoolExecutor(8) as pool:
        return dict(zip(urls, pool.map(lambda url: count_shard(url, key, cache), urls), strict=True))


def expand(part: str) -> list[str]:
    """The urls of one part: braces expanded, globs searched, the shards of a manifest.jsonl, local files checked.

    Raises:
        ConfigError: the part is empty or a `pipe:` command.
        StorageError: nothing is there.
    """
    import braceexpand

    if not part.strip():
        raise ConfigError("--train-data: an empty url. Remove the `::` too many.")
    if part.startswith("pipe:"):
        raise ConfigError(
            f"{part}: `pipe:` would run a shell command. Give the url itself: s3://, http(s)://, hf:// or a path."
        )
    urls: list[str] = []
    for url in braceexpand.braceexpand(part):
        if not any(sign in url for sign in "*?["):
            urls.append(url)
            continue
        found = storage.glob(url)
        if not found:
            raise StorageError(f"{storage.shown(url)}: no file matches. Check the path.")
        urls += found
    folders = [url for url in urls if not storage.is_remote(url) and os.path.isdir(storage.local_path(url))]
    if folders:
        raise StorageError(
            f"{folders[0]}: is a folder. Name its shards ({folders[0].rstrip('/')}/*.tar) or use --dataset-manifest."
        )
    if missing := [url for url in urls if not storage.is_remote(url) and not storage.local_path(url).exists()]:
        more = f" (and {len(missing) - 1} more)" if len(missing) > 1 else ""
        raise StorageError(f"{missing[0]}{more}: no such shard. Check --train-data.")
    return [shard for url in urls for shard in (_listed(url) if url.endswith(".jsonl") else [url])]


def _listed(manifest: str) -> list[str]:
    return [shard.url for shard in read_manifest(manifest)]


def _names(urls: Sequence[str]) -> list[str]:
    """Names by which shards are ordered: paths below their common folder, so that moving a data set changes nothing."""
    folders = [storage.parent(url).split("/") for url in urls]
    common = next((k for k, parts in enumerate(zip(*folders)) if len(set(parts)) > 1), min(map(len, folders)))  # noqa: B905
    return ["/".join([*folder[common:], shard_name(url)]) for folder, url in zip(folders, urls, strict=True)]


def _manifest_beside(folder: str) -> dict[str, Shard]:
    url = storage.join(folder, FILENAME)
    return {shard.name.removesuffix(".tar"): shard for shard in read_manifest(url)} if storage.exists(url) else {}


def count_shard(url: str, key: str, cache: BlockCache | None = None) -> Shard:
    """Name, count and layout of a shard without a manifest, from its headers."""
    if cache is not None and storage.is_remote(url):
        index = cache.index(cache.find(Shard(shard_name(url), url, 0)), key)
    else:
        index = index_file(url, storage.shown(url), key)
    return Shard(shard_name(url), url, len(index), index.key, layout_of(index))
