"""Who is where, when: the ego vehicle's way and all actors, never two at one place."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from ..classes import CLASSES
from .actors import Actor, Shape, make_shape
from .meshes import Material
from .paths import Motion, Path, footprints_touch
from .roads import KERB_M, LANE_M, PARKING_M, Road, RoadMap
from .vehicles import draw_paint

EGO_HALF_M = (2.04, 0.87)
EGO_MIDDLE_M = 1.1  # from the rear axle, the origin of the ego frame, to the middle of the vehicle
GAP_M = 0.25  # kept between any two actors, and from what stands still
# Shapes of a catalogue: enough that a scene seldom shows one twice in the same size and colour.
VARIANTS = {"car": 36, "pedestrian": 24, "truck": 20}


@dataclass(frozen=True)
class Traffic:
    """`ego` moves the rear axle; actors are numbered from 1 by their place in the list."""

    ego: Motion
    actors: tuple[Actor, ...]


class Catalogue:
    """Shapes by class, variant and number, built once per process when first asked for; a function of the seed."""

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self._shapes: dict[tuple[str, str, int], Shape] = {}

    def original(self, shape: Shape) -> Shape:
        """The catalogue's shape that one is a variant of."""
        return self._shapes[shape.key]

    def draw(self, label: str, variant: str, rng: np.random.Generator) -> Shape:
        """A shape of the catalogue, in a size of its own and, if painted, a colour of its own."""
        number = int(rng.integers(VARIANTS.get(label, 12)))
        key = (label, variant, number)
        if key not in self._shapes:
            entropy = [self.seed, CLASSES.index(label), number, *variant.encode()]
            self._shapes[key] = make_shape(label, np.random.default_rng(entropy), variant)
        shape = self._shapes[key]
        factors = rng.uniform(0.96, 1.04, 3)
        mesh = shape.mesh.scaled(factors)
        painted = mesh.material == Material.PAINT
        if label in ("car", "motorcycle", "bicycle") and painted.any():
            colours, counts = np.unique(mesh.colour[painted], axis=0, return_counts=True)
            main = painted & (mesh.colour == colours[counts.argmax()]).all(axis=1)
            mesh = replace(
                mesh, colour=np.where(main[:, None], np.array(draw_paint(rng), dtype=np.float32), mesh.colour)
            )
        length, width, height = (float(a * b) for a, b in zip(shape.size_lwh_m, factors, strict=True))
        scale = (float(factors[0]), float(factors[1]), float(factors[2]))
        return replace(shape, mesh=mesh, size_lwh_m=(length, width, height), key=key, scale=scale)


class _Registry:
    """Accepts actors that stay clear of all others, of the ego vehicle and of obstacles, at all times."""

    def __init__(
        self, times_s: NDArray[np.float64], obstacles: NDArray[np.float64], classes: tuple[str, ...]
    ) -> None:
        self.times_s = times_s
        self.classes = classes
        self.actors: list[Actor] = []
        capacity = 1024
        self.poses = np.zeros((capacity, len(times_s), 3))
        self.halves = np.zeros((capacity, 2))
        self.count = 0
        self.obstacles = obstacles

    def occupy(self, poses: NDArray[np.float64], half: tuple[float, float]) -> None:
        self.poses[self.count], self.halves[self.count] = poses, half
        self.count += 1

    def offer(self, actor: Actor, gap_m: float = GAP_M) -> bool:
        if actor.shape.label not in self.classes or self.count == len(self.poses):
            return False
        poses = actor.motion.at(self.times_s)  # (T, 3)
        half = np.array(actor.shape.size_lwh_m[:2]) / 2
        wide = half + gap_m
        others, others_half = self.poses[: self.count], self.halves[: self.count]
        reach = np.hypot(*wide) + np.hypot(others_half[:, 0], others_half[:, 1])
        distance = np.linalg.norm(others[..., :2] - poses[:, :2], axis=-1).min(axis=1)
        near = distance < reach
        if near.any() and footprints_touch(poses, wide, others[near], others_half[near, None]).any():
            return False
        if len(self.obstacles):
            spots = self.obstacles
            distance = np.linalg.norm(spots[:, None, :2] - poses[:, :2], axis=-1).min(axis=1)
            near = distance < np.hypot(*wide) + np.hypot(spots[:, 3], spots[:, 4])
            if (
                near.any()
                and footprints_touch(poses, wide, spots[near, None, :3], spots[near, None, 3:]).any()
            ):
                return False
        self.occupy(poses, (float(half[0]), float(half[1])))
        self.actors.append(actor)
        return True


def draw_traffic(
    roads: RoadMap,
    obstacles: NDArray[np.float64],
    catalogue: Catalogue,
    times_s: NDArray[np.float64],
    extent_m: float,
    classes: tuple[str, ...],
    rng: np.random.Generator,
) -> Traffic:
    """Draws the ego vehicle's way and the actors around it.

    Args:
        roads: of the scene.
        obstacles: (m, 5) footprints that stand still.
        catalogue: of shapes.
        times_s: (T,) increasing, at which overlaps are looked for; spans the scene.
        extent_m: how far from the middle of the ego vehicle's way actors live.
        classes: which may occur.
        rng: of the scene.
    """
    town = _Town(roads, extent_m, times_s, rng)
    ego = town.draw_ego()
    registry = _Registry(times_s, obstacles, classes)
    ego_poses = ego.at(times_s)
    middle = ego_poses.copy()
    middle[:, 0] += EGO_MIDDLE_M * np.cos(ego_poses[:, 2])
    middle[:, 1] += EGO_MIDDLE_M * np.sin(ego_poses[:, 2])
    registry.occupy(middle, (EGO_HALF_M[0] + 0.5, EGO_HALF_M[1] + 0.35))
    town.centre = ego_poses[len(times_s) // 2, :2]
    scene = _Cast(town, registry, catalogue, rng)
    # Large and rare things first: they need the room.
    scene.road_works()
    scene.moving_vehicles()
    scene.parked_vehicles()
    scene.barriers_on_kerbs()
    scene.cycle_stands()
    scene.cyclists()
    scene.pedestrians()
    return Traffic(ego, tuple(registry.actors))


class _Town:
    """Lanes and pavements as paths."""

    def __init__(
        self, roads: RoadMap, extent_m: float, times_s: NDArray[np.float64], rng: np.random.Generator
    ) -> None:
        self.roads = roads
        self.extent_m = extent_m
        self.times_s = times_s
        self.rng = rng
        self.centre = np.zeros(2)

    def lane(self, road: Road, direction: int, number: int = 0) -> Path:
        """A lane along a road (direction 1) or against it (-1); traffic keeps to the right; 0 is the inner one."""
        return self.offset_path(road, direction, -direction * LANE_M * (number + 0.5))

    def offset_path(self, road: Road, direction: int, d: float) -> Path:
        start = -260.0 if road.start_m is None else road.start_m + 1.0
        if road.curvature:
            half_turn = 0.8 * np.pi / abs(road.curvature)
            start = max(start, -half_turn)
        end = -start if road.start_m is None else 260.0
        points, _ = road.place(np.arange(start, end, 1.0)[::direction], d)
        return Path.through(points)

    def turning_lane(self, direction: int, which: int, way: int) -> Path | None:
        """From the main road into side road `which`; `way` 1 along the side road, -1 against it."""
        side_road = self.roads.roads[1 + which]
        if way < 0 and side_road.start_m is not None:
            return None
        before, after = self.lane(self.roads.roads[0], direction), self.lane(side_road, way)
        gaps = np.linalg.norm(before.points[:, None] - after.points[None], axis=-1)
        i, j = np.unravel_index(gaps.argmin(), gaps.shape)
        corner = (before.points[i] + after.points[j]) / 2
        if i < 20 or len(after.points) - j < 20:
            return None
        radius = 11.0 if gaps.min() < 2 else 14.0
        return Path.with_round_corner(before.points[: i + 1], after.points[j:], corner, radius)

    def draw_ego(self) -> Motion:
        rng = self.rng
        duration = float(self.times_s[-1])
        main = self.roads.roads[0]
        turn = self.turning_lane(1, 0, 1) if len(self.roads.roads) > 1 and rng.random() < 0.35 else None
        if turn is not None:
            speed = rng.uniform(3.5, 6.5)
            point, _ = main.place(self.roads.junctions_s_m[0], 0.0)
            start = turn.nearest(point) - speed * duration * rng.uniform(0.3, 0.8)
            return Motion(turn, max(start, 1.0), speed, 0.0)
        lane = self.lane(main, 1, int(rng.integers(main.lanes_each_way)))
        kind = rng.random()
        speed = 0.0 if kind < 0.12 else rng.uniform(3.0, 11.0)
        acceleration = float(rng.uniform(-0.8, 0.8)) if speed else 0.0
        start = lane.nearest((0.0, 0.0)) - speed * duration * rng.uniform(0.2, 0.7)
        return Motion(lane, start, speed, acceleration)


class _Cast:
    """Fills a town with actors of each kind."""

    def __init__(
        self, town: _Town, registry: _Registry, catalogue: Catalogue, rng: np.random.Generator
    ) -> None:
        self.town, self.registry, self.catalogue, self.rng = town, registry, catalogue, rng
        # Numbers below are for 60 m each way; with the extent they grow, so that the street is as full.
        self.density = town.extent_m / 60.0
        self.works: list[tuple[Road, int, float, float]] = []

    def _spot(self, road: Road, s: float, d: float, turn: float = 0.0) -> tuple[float, float, float]:
        point, heading = road.place(s, d)
        return float(point[0]), float(point[1]), float(heading) + turn

    def _inside(self, x: float, y: float) -> bool:
        return bool(np.hypot(x - self.town.centre[0], y - self.town.centre[1]) < self.town.extent_m)

    def _stand(
        self, shape: Shape, spot: tuple[float, float, float], attribute: str, gap_m: float = GAP_M
    ) -> bool:
        x, y, yaw = spot
        if not self._inside(x, y):
            return False
        ground = KERB_M if self.town.roads.distance_at(x, y) > 0 else 0.0
        return self.registry.offer(Actor(shape, Motion(None, rest=(x, y, yaw)), ground, attribute), gap_m)

    def _drive(
        self, shape: Shape, path: Path, start: float, speed: float, attribute: str, ground: float = 0.0
    ) -> bool:
        poses = path.at([start, start + speed * self.town.times_s[-1]])
        if start < 8 or start + speed * self.town.times_s[-1] > path.length[-1] - 8:
            return False
        if not any(self._inside(x, y) for x, y, _ in poses):
            return False
        return self.registry.offer(Actor(shape, Motion(path, start, speed), ground, attribute), 0.45)

    def _range(self, road: Road) -> tuple[float, float]:
        """Where along a road actors may be."""
        x, y = self.town.centre
        s, _ = road.locate(np.array([x]), np.array([y]))
        low, high = float(s[0]) - self.town.extent_m, float(s[0]) + self.town.extent_m
        return (low if road.start_m is None else max(low, road.half_width_m + 6)), high

    def _clear_of_junctions(self, road: Road, s: float, margin: float) -> bool:
        point, _ = road.place(s, 0.0)
        for other in self.town.roads.roads:
            if other is not road:
                distance = other.kerb_distance(*other.locate(point[:1].copy(), point[1:].copy()))
                if distance[0] < margin:
                    return False
        return True

    def moving_vehicles(self) -> None:
        """Cars, trucks, buses, trailers and motorcycles in their lanes; some wait, some turn."""
        rng, town = self.rng, self.town
        labels = ["car", "truck", "bus", "trailer", "motorcycle"]
        weights = np.array([0.60, 0.14, 0.10, 0.08, 0.08])
        for index, road in enumerate(town.roads.roads):
            for direction in (1, -1):
                for number in range(road.lanes_each_way):
                    lane = town.lane(road, direction, number)
                    waits = index > 0 and rng.random() < 0.4
                    speed_of_lane = 0.0 if waits else rng.uniform(4.0, 11.0)
                    middle = lane.nearest(town.centre)
                    place = middle - town.extent_m - speed_of_lane * town.times_s[-1] / 2
                    while place < middle + town.extent_m:
                        label = labels[int(rng.choice(len(labels), p=weights))]
                        attribute = "vehicle.moving" if speed_of_lane else "vehicle.stopped"
                        place += self._one_vehicle(label, lane, place, speed_of_lane, attribute)
                        place += rng.uniform(2.0, 5.0) if waits else rng.uniform(5.0, 26.0)
        for which in range(len(town.roads.roads) - 1):
            path = town.turning_lane(-1, which, 1)
            if path is not None and rng.random() < 0.6:
                point, _ = town.roads.roads[0].place(town.roads.junctions_s_m[which], 0.0)
                start = path.nearest(point) - rng.uniform(0, 16)
                self._drive(
                    self.catalogue.draw("car", "", rng), path, start, rng.uniform(3, 5.5), "vehicle.moving"
                )

    def _one_vehicle(self, label: str, lane: Path, place: float, speed: float, attribute: str) -> float:
        """Puts a vehicle (a trailer behind its tractor) with its rear at `place`; the length it takes."""
        rng = self.rng
        shape = self.catalogue.draw(label, "rider" if label == "motorcycle" else "", rng)
        length = shape.size_lwh_m[0]
        if label == "motorcycle":
            attribute = "cycle.with_rider"
        self._drive(shape, lane, place + length / 2, speed, attribute)
        if label == "trailer" and "truck" in self.registry.classes:
            tractor = self.catalogue.draw("truck", "", rng)
            place_of_tractor = place + length + 1.0 + tractor.size_lwh_m[0] / 2
            self._drive(tractor, lane, place_of_tractor, speed, attribute)
            length += 1.0 + tractor.size_lwh_m[0]
        return length

    def parked_vehicles(self) -> None:
        """Along the kerb where the road has room for it; now and then on the verge behind the pavement."""
        rng = self.rng
        labels, weights = (
            ["car", "truck", "motorcycle", "trailer", "bus"],
            np.array([0.78, 0.09, 0.05, 0.05, 0.03]),
        )
        for road in self.town.roads.roads:
            if not road.parking:
                continue
            occupied = rng.uniform(0.45, 0.85)
            for side in (-1, 1):
                s, end = self._range(road)
                while s < end:
                    label = labels[int(rng.choice(len(labels), p=weights))]
                    shape = self.catalogue.draw(label, "", rng)
                    length, width, _ = shape.size_lwh_m
                    if rng.random() < occupied and self._clear_of_junctions(road, s + length / 2, 9.0):
                        d = side * (
                            road.half_width_m - max(PARKING_M / 2, width / 2 + 0.15) + rng.uniform(-0.1, 0.1)
                        )
                        turn = (0 if side < 0 else np.pi) + rng.normal(0, 0.015)
                        attribute = "cycle.without_rider" if label == "motorcycle" else "vehicle.parked"
                        self._stand(shape, self._spot(road, s + length / 2, d, turn), attribute)
                        s += length + rng.uniform(0.7, 1.6)
                    else:
                        s += rng.uniform(4.0, 8.0)

    def road_works(self) -> None:
        """A closed stretch of the outer lane or parking strip: cones, barriers, a machine, workers."""
        rng = self.rng
        if rng.random() > 0.8:
            return
        road = self.town.roads.roads[0]
        low, high = self._range(road)
        for _ in range(6):
            length = rng.uniform(14, 24)
            start = rng.uniform(low + 10, high - 10 - length)
            if self._clear_of_junctions(road, start, 8) and self._clear_of_junctions(road, start + length, 8):
                break
        else:
            return
        side = int(rng.choice([-1, 1]))
        # On a narrow road the works lie on the verge behind the pavement's edge.
        on_road = road.parking or road.lanes_each_way > 1
        outer = road.half_width_m - 0.2
        inner = outer - (PARKING_M + 0.3 if road.parking else LANE_M) if on_road else road.half_width_m + 0.6
        if not on_road:
            outer = inner + 3.2
        middle = side * (inner + outer) / 2
        vehicle = self.catalogue.draw("construction_vehicle", "", rng)
        turn = float(rng.choice([0, np.pi])) + rng.normal(0, 0.05)
        self._stand(vehicle, self._spot(road, start + length * 0.55, middle, turn), "vehicle.stopped")
        if rng.random() < 0.4:
            other = self.catalogue.draw(str(rng.choice(["construction_vehicle", "truck"])), "", rng)
            self._stand(other, self._spot(road, start + length * 0.55 + 8.5, middle, turn), "vehicle.stopped")
        s, end = start + 2.0, start + length
        barriers = self.catalogue.draw("barrier", "", rng)
        while s < end:
            self._stand(
                barriers, self._spot(road, s, side * inner, side * np.pi / 2 + rng.normal(0, 0.03)), "", 0.04
            )
            s += barriers.size_lwh_m[1] + rng.uniform(0.1, 0.35)
        cone = self.catalogue.draw("traffic_cone", "", rng)
        for k in range(int(rng.integers(5, 9))):
            ahead, d = start + length + 1.5 + 1.9 * k, inner + (outer - inner) * k / 8
            behind = start - 0.5 - 1.9 * k
            self._stand(
                cone, self._spot(road, ahead if side > 0 else behind, side * d, rng.uniform(-3, 3)), ""
            )
        for _ in range(int(rng.integers(2, 5))):
            worker = self.catalogue.draw("pedestrian", "standing worker", rng)
            spot = self._spot(
                road, rng.uniform(start + 1, end), side * rng.uniform(inner + 0.7, outer), rng.uniform(-3, 3)
            )
            self._stand(worker, spot, "pedestrian.standing")

    def barriers_on_kerbs(self) -> None:
        """Rows along the pavement's edge, and cones in front of drives and on corners."""
        rng = self.rng
        for _ in range(int(rng.poisson(1.3 * self.density))):
            road = self.town.roads.roads[int(rng.integers(len(self.town.roads.roads)))]
            low, high = self._range(road)
            s, side = rng.uniform(low, high), int(rng.choice([-1, 1]))
            shape = self.catalogue.draw("barrier", "", rng)
            for _ in range(int(rng.integers(3, 8))):
                if self._clear_of_junctions(road, s, 6.0):
                    turn = side * np.pi / 2 + rng.normal(0, 0.03)
                    self._stand(shape, self._spot(road, s, side * (road.half_width_m + 0.35), turn), "", 0.04)
                s += shape.size_lwh_m[1] + rng.uniform(0.1, 0.4)
        for _ in range(int(rng.poisson(2.5 * self.density))):
            road = self.town.roads.roads[int(rng.integers(len(self.town.roads.roads)))]
            low, high = self._range(road)
            s, side = rng.uniform(low, high), int(rng.choice([-1, 1]))
            cone = self.catalogue.draw("traffic_cone", "", rng)
            for _ in range(int(rng.integers(1, 5))):
                d = side * (road.half_width_m + rng.uniform(-0.8, 0.6))
                self._stand(cone, self._spot(road, s, d, rng.uniform(-3, 3)), "")
                s += rng.uniform(1.2, 3.0)

    def cycle_stands(self) -> None:
        """Bicycles and motorcycles left on the pavement, in rows or alone."""
        rng = self.rng
        for label, rate in (("bicycle", 3.6), ("motorcycle", 2.4)):
            for _ in range(int(rng.poisson(rate * self.density))):
                road = self.town.roads.roads[int(rng.integers(len(self.town.roads.roads)))]
                low, high = self._range(road)
                s, side = rng.uniform(low, high), int(rng.choice([-1, 1]))
                turn = float(rng.choice([np.pi / 2, -np.pi / 2, 0.0]))
                for _ in range(int(rng.integers(1, 5))):
                    shape = self.catalogue.draw(label, "", rng)
                    spot = self._spot(road, s, side * (road.half_width_m + 1.3), turn + rng.normal(0, 0.06))
                    self._stand(shape, spot, "cycle.without_rider", 0.12)
                    s += rng.uniform(0.95, 1.3) if turn else rng.uniform(2.3, 2.8)

    def cyclists(self) -> None:
        """Riders near the kerb."""
        rng = self.rng
        for road in self.town.roads.roads:
            for direction in (1, -1):
                d = -direction * (road.half_width_m - (PARKING_M if road.parking else 0) - 0.55)
                path = self.town.offset_path(road, direction, d)
                middle = path.nearest(self.town.centre)
                for _ in range(int(rng.poisson(3.0 * self.density))):
                    label = "bicycle" if rng.random() < 0.7 else "motorcycle"
                    speed = rng.uniform(2.5, 6.0)
                    start = (
                        middle + rng.uniform(-1, 1) * self.town.extent_m - speed * self.town.times_s[-1] / 2
                    )
                    self._drive(
                        self.catalogue.draw(label, "rider", rng), path, start, speed, "cycle.with_rider"
                    )

    def pedestrians(self) -> None:
        """Walking along pavements, standing in groups, sitting, crossing at junctions and between."""
        rng = self.rng
        for index, road in enumerate(self.town.roads.roads):
            low, high = self._range(road)
            for side in (-1, 1):
                for _ in range(int(rng.poisson((10 if index == 0 else 5) * self.density))):
                    direction = int(rng.choice([-1, 1]))
                    d = side * (road.half_width_m + rng.uniform(1.7, 3.9))
                    path = self.town.offset_path(road, direction, d)
                    point, _ = road.place(rng.uniform(low, high), d)
                    speed = rng.uniform(0.8, 1.7)
                    for k in range(1 + int(rng.random() < 0.3)):  # some walk in pairs
                        start = path.nearest(point) - speed * self.town.times_s[-1] / 2 - 0.3 * k
                        beside = self.town.offset_path(road, direction, d + 0.75 * k) if k else path
                        if not self._stays_on_pavement(beside, start, speed):
                            continue
                        kind = "walking child" if rng.random() < 0.1 else "walking"
                        shape = self.catalogue.draw("pedestrian", kind, rng)
                        self._drive(shape, beside, start, speed, "pedestrian.moving", KERB_M)
                for _ in range(int(rng.poisson((3.5 if index == 0 else 1.5) * self.density))):
                    self._standing_group(road, rng.uniform(low, high), side)
        self._crossing_people()

    def _stays_on_pavement(self, path: Path, start: float, speed: float) -> bool:
        poses = path.at(start + speed * self.town.times_s)
        return bool(self.town.roads.kerb_distance(poses[:, 0], poses[:, 1]).min() > 0.5)

    def _standing_group(self, road: Road, s: float, side: int) -> None:
        rng = self.rng
        x, y, _ = self._spot(road, s, side * (road.half_width_m + rng.uniform(1.0, 4.2)))
        if self.town.roads.distance_at(x, y) < 0.6:
            return
        for _ in range(int(rng.integers(1, 4))):
            at = rng.uniform(-0.9, 0.9, 2)
            pose = "sitting" if rng.random() < 0.12 else "standing"
            kind = " child" if rng.random() < 0.08 else ""
            attribute = "pedestrian.sitting_lying_down" if pose == "sitting" else "pedestrian.standing"
            yaw = float(np.arctan2(-at[1], -at[0])) + rng.normal(0, 0.5)
            shape = self.catalogue.draw("pedestrian", pose + kind, rng)
            self._stand(shape, (x + float(at[0]), y + float(at[1]), yaw), attribute, 0.1)

    def _crossing_people(self) -> None:
        """Over the crossings at junctions, and over the main road at one more place."""
        rng, roads = self.rng, self.town.roads
        main = roads.roads[0]
        low, high = self._range(main)
        places = [(main, rng.uniform(low, high), 2.0)]
        for place, side_road in zip(roads.junctions_s_m, roads.roads[1:], strict=True):
            for sign in (-1, 1):
                places.append((main, place + sign * (side_road.half_width_m + 3.0), 3.0))
            places.append((side_road, main.half_width_m + 3.0, 3.0))
        for road, s, rate in places:
            for _ in range(int(rng.poisson(rate))):
                reach = road.half_width_m - 0.3
                points, _ = road.place(s + rng.uniform(-1.2, 1.2), np.linspace(-reach - 12, reach + 12, 60))
                path = Path.through(points[:: int(rng.choice([-1, 1]))])
                speed = rng.uniform(0.9, 1.6)
                travel = speed * float(self.town.times_s[-1] - self.town.times_s[0])
                if travel > 2 * reach - 1:
                    continue
                start = rng.uniform(12.5, 11.5 + 2 * reach - travel) - speed * float(self.town.times_s[0])
                shape = self.catalogue.draw("pedestrian", "walking", rng)
                self._drive(shape, path, start, speed, "pedestrian.moving", 0.0)
