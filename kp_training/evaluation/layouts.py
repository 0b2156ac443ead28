"""Finds the files of stereo scenes, by a listing or by the layouts of Middlebury's releases.

The listing `scenes.json` is a list of objects with `dir`, `left`, `right`, `gt` (file names) and
`scale` (stored value / pixels). Optional are `set`, the release of the scene, and `refright`, true
if the map belongs to the right image. Without a listing, all subfolders are searched for the files
of a release (vision.middlebury.edu/stereo/data):

    2001          im2, im6, disp2, disp6 (Map: im0, im1, disp0, disp1; Tsukuba: scene1.row3.col3)
    2003          im2, im6 (imL, imR), disp2, disp6
    2005, 2006    view1, view5 (in Illum?/Exp? if all views are present), disp1, disp5
    2014, 2021    im0.png, im1.png, disp0.pfm, disp1.pfm, calib.txt
    MiddEval3     im0.png, im1.png, disp0GT.pfm, disp1GT.pfm, mask0nocc.png; ETH3D uses it too

PFM maps are in pixels. Other maps have the scale that the release defines for each size; the size
is recognised by the height of the map.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import cv2

from kp_training.image_files import folders_below, read_image

LISTING = "scenes.json"
SCENE_KEYS = {"dir", "left", "right", "gt", "scale"}
IMAGES = (".png", ".ppm", ".pgm")
OTHER_MAP = {"disp0": "disp1", "disp0GT": "disp1GT", "disp1": "disp5", "disp2": "disp6"}


@dataclass(frozen=True)
class Layout:
    """File names of one release, without suffix, and the scale of its maps by their height."""

    release: str
    left: str
    right: str
    truth: str
    scales: Mapping[int, float] | None = None  # None: PFM, in pixels
    other: str | None = None  # the right image's map


OLD_SCALES = {1500: 1, 750: 2, 375: 4, 380: 8, 381: 8, 383: 8}  # three sizes of 2003, then 2001
LAYOUTS = (
    Layout("MiddEval3", "im0", "im1", "disp0GT", None, "disp1GT"),
    Layout("2014, 2021", "im0", "im1", "disp0", None, "disp1"),
    Layout("2005, 2006", "view1", "view5", "disp1", {1110: 1, 555: 2, 370: 3}, "disp5"),
    Layout("2001, 2003", "im2", "im6", "disp2", OLD_SCALES, "disp6"),
    Layout("2001, 2003", "imL", "imR", "disp2", OLD_SCALES, "disp6"),
    Layout("2001 Map", "im0", "im1", "disp0", {216: 8}, "disp1"),
    Layout("2001 Tsukuba", "scene1.row3.col3", "scene1.row3.col4", "truedisp.row3.col3", {288: 16}),
)


@dataclass(frozen=True)
class SceneFiles:
    """The files of a rectified pair and its ground truth. Disparity is stored value / `scale`."""

    name: str
    release: str
    left: Path
    right: Path
    truth: Path  # of the left image
    scale: float
    other_truth: Path | None = None  # of the right image
    mask: Path | None = None  # of the left image: 255 visible in both, 128 occluded, 0 unknown
    other_mask: Path | None = None


def find_scenes(folder: Path) -> tuple[list[SceneFiles], list[str]]:
    """Find the scenes of a folder, by its listing if it has one.

    Returns:
        The scenes, and the reasons why others were skipped.

    Raises:
        ValueError: `folder` is not a folder, has a broken listing or no scene.
    """
    if not folder.is_dir():
        raise ValueError(f"{folder} is not a folder")
    if (folder / LISTING).is_file():
        return _listed(folder)
    scenes, skipped = [], []
    for place in folders_below(folder):
        if place.match("Illum*/Exp*"):  # images of the scene two folders above
            continue
        found = _by_layout(folder, place)
        if isinstance(found, SceneFiles):
            scenes.append(found)
        elif found:
            skipped.append(f"{_name(folder, place)}: {found}")
    if not scenes and not skipped:
        raise ValueError(
            f"{folder} has neither {LISTING} nor a scene in a layout of Middlebury's releases"
        )
    return scenes, skipped


def _name(folder: Path, place: Path) -> str:
    return folder.resolve().name if place == folder else place.relative_to(folder).as_posix()


def _listed(folder: Path) -> tuple[list[SceneFiles], list[str]]:
    listing = folder / LISTING
    try:
        entries = json.loads(listing.read_text())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{listing} is not JSON: {error}") from error
    if not isinstance(entries, list) or not all(_is_entry(entry) for entry in entries):
        raise ValueError(f"{listing} must be a list of scenes with {', '.join(sorted(SCENE_KEYS))}")
    scenes, skipped = [], []
    times: Counter[str] = Counter()
    for entry in entries:
        times[entry["dir"]] += 1
        again = f" ({times[entry['dir']]})" if times[entry["dir"]] > 1 else ""
        name = entry["dir"] + again  # a folder may hold several pairs
        if entry.get("refright"):
            skipped.append(f"{name}: its map belongs to the right image")
            continue
        place = folder / entry["dir"]
        truth = place / entry["gt"]
        other = OTHER_MAP.get(truth.stem)
        scenes.append(
            SceneFiles(
                name,
                str(entry.get("set", "")),
                place / entry["left"],
                place / entry["right"],
                truth,
                entry["scale"],
                _existing(truth.with_name(other + truth.suffix)) if other else None,
                *_masks(place),
            )
        )
    return scenes, skipped


def _is_entry(entry: object) -> bool:
    return (
        isinstance(entry, dict)
        and entry.keys() >= SCENE_KEYS
        and all(isinstance(entry[key], str) for key in SCENE_KEYS - {"scale"})
        and all(Path(entry[key]).name for key in ("left", "right", "gt"))
        and not any("\0" in entry[key] for key in SCENE_KEYS - {"scale"})
        and isinstance(entry["scale"], int | float)
        and entry["scale"] > 0
    )


def _by_layout(folder: Path, place: Path) -> SceneFiles | str | None:
    """The scene of a folder, or the reason why it is unusable, or None if it is no scene."""
    files = {p.stem: p for p in sorted(place.iterdir()) if p.suffix in (*IMAGES, ".pfm")}
    missing = None
    for layout in LAYOUTS:
        truth = files.get(layout.truth)
        pair = _images(files, place, layout)
        if truth is not None and (truth.suffix == ".pfm") != (layout.scales is None):
            continue
        if truth is None or pair is None:
            if truth is not None or (pair is not None and layout.left in files):
                missing = missing or (
                    f"has {truth.name}, but not {layout.left} and {layout.right}"
                    if truth is not None
                    else f"has {layout.left} and {layout.right}, but no ground truth"
                )
            continue
        scale = 1.0
        if layout.scales is not None:
            stored = read_image(truth, cv2.IMREAD_UNCHANGED)
            if stored is None:
                return f"{truth.name} cannot be read"
            if len(stored) not in layout.scales:
                return (
                    f"no release has a {truth.name} with {len(stored)} rows; give its scale in "
                    f"{LISTING}"
                )
            scale = layout.scales[len(stored)]
        other = files.get(layout.other or "")
        if other is not None and other.suffix != truth.suffix:
            other = None
        name = _name(folder, place)
        return SceneFiles(name, layout.release, *pair, truth, scale, other, *_masks(place))
    return missing


def _images(files: dict[str, Path], place: Path, layout: Layout) -> tuple[Path, Path] | None:
    """The left and right image of a layout, if both exist."""
    if layout.left not in files:
        # Releases of 2005 and 2006 with all views: take the middle illumination and exposure.
        inner = sorted(place.glob(f"Illum*/Exp*/{layout.left}.png"))
        if inner:
            files = {p.stem: p for p in inner[len(inner) // 2].parent.iterdir()}
    if layout.left in files and layout.right in files:
        return files[layout.left], files[layout.right]
    return None


def _existing(path: Path) -> Path | None:
    return path if path.is_file() else None


def _masks(place: Path) -> tuple[Path | None, Path | None]:
    return _existing(place / "mask0nocc.png"), _existing(place / "mask1nocc.png")
