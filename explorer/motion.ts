// Blocks move from where they were to where they are: the step before and the step behind are both on the screen.

const MILLISECONDS = 550;

export type Places = Map<string, DOMRect>;

const keyOf = (tile: HTMLElement): string => `${tile.dataset.block}/${tile.dataset.row}`;

export function placesOf(tiles: Iterable<HTMLElement>): Places {
  return new Map([...tiles].map((tile) => [keyOf(tile), tile.getBoundingClientRect()]));
}

export function moveFrom(before: Places, tiles: Iterable<HTMLElement>): void {
  if (matchMedia("(prefers-reduced-motion: reduce)").matches) return;
  for (const tile of tiles) {
    const old = before.get(keyOf(tile)) ?? before.get(`${tile.dataset.block}/0`);
    const now = tile.getBoundingClientRect();
    if (!old || now.width === 0 || now.height === 0) continue;
    const shift = `translate(${old.left - now.left}px, ${old.top - now.top}px)`;
    const scale = `scale(${old.width / now.width}, ${old.height / now.height})`;
    tile.animate(
      [
        { transform: `${shift} ${scale}`, zIndex: 2 },
        { transform: "none", zIndex: 2 },
      ],
      {
        duration: MILLISECONDS,
        easing: "ease-in-out",
      },
    );
  }
}

/** The tile that is next in the direction of an arrow key, if there is one. */
export function neighbour(tiles: HTMLElement[], from: HTMLElement, key: string): HTMLElement | undefined {
  const here = middleOf(from);
  const ahead = tiles
    .filter((tile) => tile !== from)
    .map((tile) => ({ tile, ...offset(here, middleOf(tile), key) }));
  return ahead
    .filter(({ along }) => along > 1)
    .sort((a, b) => a.along + 3 * a.aside - b.along - 3 * b.aside)[0]?.tile;
}

interface Point {
  x: number;
  y: number;
}

function middleOf(tile: HTMLElement): Point {
  const { left, top, width, height } = tile.getBoundingClientRect();
  return { x: left + width / 2, y: top + height / 2 };
}

function offset(here: Point, there: Point, key: string): { along: number; aside: number } {
  const [right, down] = [there.x - here.x, there.y - here.y];
  if (key === "ArrowLeft") return { along: -right, aside: Math.abs(down) };
  if (key === "ArrowRight") return { along: right, aside: Math.abs(down) };
  if (key === "ArrowUp") return { along: -down, aside: Math.abs(right) };
  return { along: down, aside: Math.abs(right) };
}
