"""Sensors of boards that are not there: their files under another root."""

from pathlib import Path

from agentd.host.memory import read
from agentd.host.sensors import SensorReader, Sensors


def board(root: Path, files: dict[str, object]) -> Path:
    for name, value in files.items():
        path = root / "sys/class" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{value}\n")
    return root


def zone(number: int, kind: str, millidegrees: int) -> dict[str, object]:
    return {
        f"thermal/thermal_zone{number}/type": kind,
        f"thermal/thermal_zone{number}/temp": millidegrees,
    }


def supply(name: str, **facts: object) -> dict[str, object]:
    return {f"power_supply/{name}/{fact}": value for fact, value in facts.items()}


def test_a_power_chip_that_always_reads_100_degrees(tmp_path: Path) -> None:
    """Jetson TX2 and Nano."""
    zones = zone(0, "CPU-therm", 45000) | zone(1, "GPU-therm", 46500) | zone(2, "PMIC-Die", 100000)
    assert SensorReader(board(tmp_path, zones)).read() == Sensors(46.5, None, None, "GPU-therm")


def test_an_input_with_nothing_connected(tmp_path: Path) -> None:
    chip = {"name": "nct6775", "temp1_label": "CPUTIN", "temp1_input": 41000, "temp2_input": 127000, "temp3_input": 0}
    files = {f"hwmon/hwmon0/{name}": value for name, value in chip.items()}
    assert SensorReader(board(tmp_path, files)).read().temperature == 41.0


def test_a_hot_zone_beside_a_cool_chip(tmp_path: Path) -> None:
    """psutil asks thermal zones only where there is no hwmon at all."""
    files = zone(0, "cpu-thermal", 93000) | {"hwmon/hwmon0/name": "nvme", "hwmon/hwmon0/temp1_input": 38000}
    assert SensorReader(board(tmp_path, files)).read() == Sensors(93.0, None, None, "cpu-thermal")


def test_a_kernel_that_says_whole_degrees(tmp_path: Path) -> None:
    """Allwinner's own ones: read as thousandths, a board of 91 °C was never held."""
    assert SensorReader(board(tmp_path, zone(0, "cpu_thermal_zone", 91))).read().temperature == 91.0


def test_the_only_sensor_counts_under_any_name(tmp_path: Path) -> None:
    assert SensorReader(board(tmp_path, zone(0, "acpitz", 50000))).read().hottest == "acpitz"
    files = {"hwmon/hwmon0/name": "nvme", "hwmon/hwmon0/temp1_input": 80000}
    assert SensorReader(board(tmp_path / "disk", files)).read() == Sensors()


def test_a_sensor_that_never_changes_is_left_out_after_a_while(tmp_path: Path) -> None:
    files = zone(0, "cpu0-thermal", 95000) | zone(1, "cpu1-thermal", 60000)
    reader = SensorReader(board(tmp_path, files))
    reads = []
    for i in range(150):
        board(tmp_path, zone(1, "cpu1-thermal", 60000 + i % 2))
        reads.append(reader.read().hottest)
    assert reads[0] == reads[100] == "cpu0-thermal"  # at first it may be true
    assert reads[-1] == "cpu1-thermal"
    board(tmp_path, zone(0, "cpu0-thermal", 96000))
    assert reader.read().hottest == "cpu0-thermal"  # it does change: from now on it is believed
    for i in range(150):
        board(tmp_path, zone(1, "cpu1-thermal", 60000 + i % 2))
        assert reader.read().hottest == "cpu0-thermal"


def test_a_sensor_is_chosen_by_its_name(tmp_path: Path) -> None:
    reader = SensorReader(board(tmp_path, zone(0, "cpu-thermal", 70000) | zone(1, "PMIC-Die", 80000)))
    assert reader.read("PMIC-Die") == Sensors(80.0, None, None, "PMIC-Die")
    assert reader.read("no-such-thing").hottest == "cpu-thermal"


def test_the_battery_of_a_mouse_is_not_the_systems(tmp_path: Path) -> None:
    mouse = supply("hidpp_battery_0", type="Battery", scope="Device", capacity=12, status="Discharging")
    assert SensorReader(board(tmp_path, mouse)).read() == Sensors()
    own = supply("BAT0", type="Battery", capacity=80, status="Discharging", present=1)
    own |= supply("BAT1", type="Battery", present=0)
    assert SensorReader(board(tmp_path, own)).read() == Sensors(None, 80.0, False)
    board(tmp_path, supply("AC", type="Mains", online=0))
    assert SensorReader(tmp_path).read().plugged is False
    board(tmp_path, supply("AC", type="Mains", online=1))
    assert SensorReader(tmp_path).read() == Sensors(None, 80.0, True)


def test_broken_files_are_no_sensors(tmp_path: Path) -> None:
    files = zone(0, "cpu-thermal", 0) | supply("BAT0", type="Battery", capacity="?")
    board(tmp_path, files)
    (tmp_path / "sys/class/thermal/thermal_zone0/temp").write_bytes(b"\xff")
    assert SensorReader(tmp_path).read() == Sensors()
    assert read(tmp_path, lambda: 5, SensorReader(tmp_path).read).as_json()["sensors"]["temperature"] is None


def test_the_sensors_of_this_machine_can_be_asked() -> None:
    sensors = SensorReader().read()
    assert sensors.temperature is None or 0 < sensors.temperature < 125
    assert sensors.battery is None or 0 <= sensors.battery <= 100
