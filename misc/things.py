"""Make a folder of photographs to try search and training on: 64 things, five photographs of each.

    python misc/things.py photos

Every photograph shows one thing at a random size and angle, in random light, on one of 23 backgrounds. The things and
backgrounds are photographs from three packages of Debian (300 MB); apt-get downloads them, and nothing is installed, so
this needs Debian or Ubuntu, but not root. The same packages and the same Pillow give the same files.
"""

import argparse
import math
import random
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image, ImageFilter, ImageOps

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from proxy_anchor import cli

PHOTOS = 5  # of each thing
WIDTH, HEIGHT = 640, 480
STAMPS, MATE, PLASMA = "tuxpaint-stamps-default", "mate-backgrounds", "plasma-workspace-wallpapers"
THINGS = {  # the name of each thing, and its cut-out among the stamps
    "airliner": "vehicles/flight/planes/747",
    "anemone": "plants/flowers/anemone_red",
    "apricot": "food/fruit/Apricot_whole",
    "avocado": "food/fruit/avocado",
    "balloon": "vehicles/flight/balloon360",
    "basketball": "sports/basketball",
    "bass_guitar": "hobbies/music/string/guitar_electric_bass",
    "bassoon": "hobbies/music/wind/bassoon",
    "binoculars": "hobbies/binoculars",
    "bus": "vehicles/masstransit/green_korean_bus",
    "camera": "hobbies/camera_35mm",
    "candy_cane": "seasonal/christmas/Candy_cane_photo_1",
    "car_wheel": "vehicles/7spoke256",
    "cello": "hobbies/music/string/cello",
    "cement_mixer": "household/tools/cementmixer",
    "cherimoya": "food/fruit/cherimoya",
    "cherries": "food/fruit/Cherry_Stella",
    "christmas_pudding": "seasonal/christmas/Christmas_pudding",
    "classical_guitar": "hobbies/music/string/guitar_classical",
    "compost_bin": "household/home_compost_bin",
    "corn": "food/vegetables/corn",
    "cymbal": "hobbies/music/percussion/cymbal_crash",
    "daffodil": "plants/flowers/daffodil",
    "drum": "hobbies/music/percussion/drum_tomtom_floor",
    "drum_kit": "hobbies/music/percussion/drumkit",
    "dumper": "vehicles/construction/dumper",
    "electric_guitar": "hobbies/music/string/guitar_electric",
    "fire_engine": "vehicles/emergency/firetruck",
    "football": "sports/football",
    "garbage_truck": "vehicles/garbagetruck",
    "gas_bottle": "household/cylinder",
    "ginger": "food/spices/ginger",
    "hammer": "household/tools/hammer",
    "kettle": "household/kettle",
    "kiwi": "food/fruit/kiwi",
    "light_bulb": "household/Lightbulb",
    "mailbox": "town/usps_mailbox",
    "mallet": "household/tools/mallet_metal",
    "mince_pie": "seasonal/christmas/Mince_Pie",
    "mushroom": "plants/mushrooms/cep-1",
    "orange": "food/fruit/orange_seville",
    "pickup": "vehicles/auto/truck",
    "plaster": "medical/bandage_adhesive",
    "racing_car": "vehicles/race/indycar",
    "roast_turkey": "seasonal/christmas/Roast_turkey",
    "sailing_boat": "vehicles/ship/walnutBoat",
    "saw": "household/tools/saw",
    "sedan": "vehicles/auto/sedan",
    "spade": "household/tools/spade",
    "sports_car": "vehicles/auto/sportscar2",
    "stethoscope": "medical/stethoscope",
    "stone_figure": "town/monuments/inukshuk-photo",
    "strawberry": "food/fruit/Strawberry2",
    "syringe": "medical/syringe",
    "tape_measure": "household/tools/measuring_tape",
    "teddy_bear": "animals/mammals/bears/toys/edward_bear",
    "toilet": "household/toilet",
    "toolbox": "household/tools/toolbox",
    "tractor_wheel": "vehicles/wheel_tractor",
    "tricycle": "vehicles/cycle/pink_tricycle",
    "trumpet": "hobbies/music/brass/trumpet",
    "violin": "hobbies/music/string/violin",
    "wheelie_bin": "household/wheelie_bin",
    "wooden_toy": "seasonal/christmas/German_Christmas_toy",
}
NATURE = "Aqua Blinds Dune FreshFlower Garden GreenMeadow LadyBird RainDrops Storm TwoWings Wood YellowFlower"
WALLPAPERS = (
    "BytheWater ColdRipple ColorfulCups DarkestHour EveningGlow FallenLeaf Grey Kite OneStandsOut Path summer_1am"
)


def fetch(package: str, folder: Path) -> Path:
    """Download a package and unpack it in a subfolder, without installing it; returns its usr/share.

    Raises OSError if that fails.
    """
    print(f"Downloading {package}", flush=True)
    run("apt-get", "download", package, folder=folder)
    (archive,) = folder.glob(f"{package}_*.deb")
    run("dpkg", "-x", archive.name, package, folder=folder)
    return folder / package / "usr/share"


def run(*command: str, folder: Path) -> None:
    """Run a command in a folder. Raises OSError if the program is missing or fails."""
    if not shutil.which(command[0]):
        raise OSError(f"{command[0]} is missing: the photographs are in packages of Debian, so use Debian or Ubuntu")
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    if done.returncode:
        raise OSError(f"'{' '.join(command)}' failed; if 'apt-get update' does not help: {done.stderr.strip()}")


def photograph(thing: Image.Image, background: Image.Image, chance: random.Random) -> Image.Image:
    """A photograph (RGB) of a thing (RGBA, without margins) in front of a section of a background (RGB)."""
    width = min(background.width, background.height * WIDTH / HEIGHT) * chance.uniform(0.5, 1)
    height = width * HEIGHT / WIDTH
    left, top = chance.uniform(0, background.width - width), chance.uniform(0, background.height - height)
    section = (left, top, left + width, top + height)
    picture = background.resize((WIDTH, HEIGHT), Image.Resampling.LANCZOS, section)
    scale = chance.uniform(0.45, 0.95) * HEIGHT / math.hypot(*thing.size)  # so it fits at any angle
    thing = thing.resize([max(1, round(side * scale)) for side in thing.size], Image.Resampling.LANCZOS)
    thing = thing.rotate(chance.uniform(-35, 35), Image.Resampling.BICUBIC, expand=True)
    free = WIDTH - thing.width, HEIGHT - thing.height
    place = [round(chance.uniform(0.25, 0.75) * side) for side in free]  # near the middle, as people frame a thing
    shadow = Image.new("L", picture.size)
    shadow.paste(thing.getchannel("A").point(lambda alpha: alpha // 2), [side + 8 for side in place])
    picture.paste(0, mask=shadow.filter(ImageFilter.GaussianBlur(8)))
    picture.paste(thing, place, thing)
    return light(picture, chance)


def light(picture: Image.Image, chance: random.Random) -> Image.Image:
    """The picture in other light: darker or brighter, warmer or colder, from one side, with the noise of a sensor."""
    warmth = chance.uniform(-0.15, 0.15)
    colour = chance.uniform(0.6, 1.3) * np.array([1 + warmth, 1, 1 - warmth])
    side = np.linspace(-1, 1, picture.width)[:, None] * chance.uniform(-0.3, 0.3)
    noise = np.random.default_rng(chance.getrandbits(32)).normal(0, 4, (picture.height, picture.width, 3))
    pixels = np.asarray(picture) * colour * (1 + side) + noise
    return Image.fromarray(pixels.round().clip(0, 255).astype(np.uint8))


def compose(things: dict[str, Path], backgrounds: list[Path], folder: Path) -> None:
    """Write folder/THING/1.jpg and so on; the photographs of a thing have different backgrounds."""
    scenes = []
    for path in backgrounds:
        with Image.open(path, formats=["JPEG"]) as image:
            scenes.append(ImageOps.cover(image.convert("RGB"), (2 * WIDTH, 2 * HEIGHT)))
    for name, path in things.items():
        with Image.open(path, formats=["PNG"]) as image:
            thing = image.convert("RGBA")
        thing = thing.crop(thing.getchannel("A").getbbox())  # without its margins
        chance = random.Random(name)
        (folder / name).mkdir(parents=True)
        for number, scene in enumerate(chance.sample(scenes, PHOTOS), 1):
            picture = photograph(thing, scene, chance)
            picture.save(folder / name / f"{number}.jpg", quality=chance.randint(75, 92))


def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="a new folder for the photographs")
    folder = parser.parse_args(argv).folder
    with cli.errors_in_one_line("things.py"), tempfile.TemporaryDirectory() as temporary:
        if folder.exists():
            raise OSError(f"{folder} exists already: expected the name of a new folder")
        stamps, mate, plasma = (fetch(package, Path(temporary)) for package in (STAMPS, MATE, PLASMA))
        things = {name: stamps / "tuxpaint/stamps" / f"{path}.png" for name, path in THINGS.items()}
        nature = [mate / "backgrounds/mate/nature" / f"{name}.jpg" for name in NATURE.split()]
        wallpapers = [plasma / "wallpapers" / name / "contents/images/2560x1600.jpg" for name in WALLPAPERS.split()]
        if missing := [path.name for path in (*things.values(), *nature, *wallpapers) if not path.exists()]:
            raise OSError(f"{missing[0]} is not in these packages: expected those of Debian 12 or 13")
        compose(things, nature + wallpapers, folder)
        notices = [
            f"From Debian's package {package}:\n\n{(share / 'doc' / package / 'copyright').read_text('utf-8')}"
            for package, share in ((STAMPS, stamps), (MATE, mate), (PLASMA, plasma))
        ]
        (folder / "LICENSES.txt").write_text("\n".join(notices), "utf-8")
        print(f"{PHOTOS} photographs each of {len(things)} things are in {folder}, their licences in LICENSES.txt")


if __name__ == "__main__":
    main()
