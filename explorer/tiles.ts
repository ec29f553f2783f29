// The pictures: a card for each rank with its frames of tiles, and the table of the blocks in flight.

import fromPython from "./from_python.json";
import { count, describe } from "./plan.js";
import type { Exchange } from "./setting.js";
import {
  elementsOf,
  flightOf,
  framesOf,
  SHOWN_ROWS,
  spread,
  usesOf,
  type Block,
  type Frame,
  type Step,
} from "./steps.js";
import { endsOf, factsOf, grouped, labelOf, type Fact } from "./words.js";

const COLOURS = fromPython.colours as unknown as Record<string, [string, string][]>;

export type Child = Node | string;

export function make(name: string, attributes: Record<string, string>, ...children: Child[]): HTMLElement {
  const element = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
  element.append(...children);
  return element;
}

/** Everything that a step shows. */
export function drawStep(exchange: Exchange, step: Step): HTMLElement {
  if (step === "in flight" || step === "output in flight") return drawFlight(exchange, step);
  const most = Math.max(1, ...exchange.plan.tokenRuns.map(count));
  const cards = exchange.plan.tokenRuns.map((tokens, rank) => {
    const tall = step === "shards" || step === "unpack output" ? count(tokens) / most : 1;
    const frames = framesOf(exchange, step, rank).map((frame) =>
      drawFrame(exchange, step, rank, frame, tall),
    );
    const notes = step === "attention" ? [drawUses(exchange, rank)] : [];
    return drawCard(exchange, rank, make("div", { class: "frames" }, ...frames), ...notes);
  });
  return make(
    "div",
    {},
    make("p", { class: "axes" }, axesOf(exchange, step)),
    make("div", { class: "cards" }, ...cards),
  );
}

/** How the pictures of a step are to be read. */
function axesOf({ layout, sizes }: Exchange, step: Step): string {
  if (step.includes("pack") !== step.includes("unpack") || step.includes("arrived")) {
    return "A buffer, from its first element to its last; a gap parts what belongs to different ranks.";
  }
  const axes = {
    "b s h d": "tokens go down, heads go across",
    "s b h d": "tokens go down (each with all rows of the batch), heads go across",
    "b h s d": "heads go down, tokens go across",
  }[layout as "b s h d"];
  const rows = layout.startsWith("s") || sizes.batch < 2n ? "" : ", one row of the batch below the other";
  const more = rows && sizes.batch > SHOWN_ROWS ? ` (${SHOWN_ROWS} of ${sizes.batch})` : "";
  return `A tensor as it lies in memory: ${axes}${rows}${more}.`;
}

function drawCard({ plan }: Exchange, rank: number, ...content: HTMLElement[]): HTMLElement {
  const owned =
    `tokens ${describe(plan.tokenRuns[rank])} · query heads ${describe(plan.headRuns.query[rank])}` +
    ` · kv heads ${describe(plan.headRuns.kv[rank])}`;
  const title = make("h4", {}, drawSwatch(plan.ranks, rank), ` rank ${rank} `, make("small", {}, owned));
  return make("section", { class: "card", "data-rank": String(rank) }, title, ...content);
}

function drawFrame(exchange: Exchange, step: Step, rank: number, frame: Frame, tall: number): HTMLElement {
  const head = make("figcaption", {}, make("b", {}, frame.name), ` ${frame.shape} `);
  const rows = new Map<string, number>();
  const chunkOf = (block: Block): number => (block.tokensOf === rank ? block.headsOf : block.tokensOf);
  const tiles = frame.tiles.map((tile, i) => {
    const row = rows.get(keyOf(tile)) ?? 0;
    rows.set(keyOf(tile), row + 1);
    const button = drawTile(exchange, step, tile, factsOf(exchange, step, tile, rank, tile.slice), row);
    if (frame.kind === "buffer" && i > 0 && chunkOf(tile) !== chunkOf(frame.tiles[i - 1]))
      button.classList.add("first");
    for (const [side, part] of Object.entries(tile.at)) button.style.setProperty(side, `${100 * part}%`);
    return button;
  });
  const area = make("div", { class: "area" }, ...(tiles.length > 0 ? tiles : [make("i", {}, "empty")]));
  area.style.setProperty("--tall", String(tall));
  area.style.setProperty("--bands", String(new Set(frame.tiles.map((tile) => tile.at.top)).size));
  const figure = make("figure", { class: frame.kind }, head, area);
  figure.style.flexGrow = String(Math.max(1, frame.weight));
  return figure;
}

/** A table of senders and receivers. What stays on a rank is on the diagonal. */
function drawFlight(exchange: Exchange, step: Step): HTMLElement {
  const ranks = exchange.plan.tokenRuns.map((_, rank) => rank);
  const head = (rank: number, scope: string): HTMLElement =>
    make("th", { scope }, drawSwatch(ranks.length, rank), ` ${scope === "row" ? "from" : "to"} ${rank}`);
  const rows = ranks.map((sender) => {
    const cells = ranks.map((receiver) => drawCell(exchange, step, sender, receiver));
    return make("tr", {}, head(sender, "row"), ...cells);
  });
  const top = make("tr", {}, make("td", {}), ...ranks.map((rank) => head(rank, "col")));
  return make("div", { class: "scrolls" }, make("table", { class: "flight" }, top, ...rows));
}

function drawCell(exchange: Exchange, step: Step, sender: number, receiver: number): HTMLElement {
  const blocks = flightOf(exchange, step, sender, receiver);
  const spans = spread(blocks.map((block) => Number(elementsOf(exchange, block))));
  const place =
    sender === receiver ? "in no message" : `in the message from rank ${sender} to rank ${receiver}`;
  const tiles = blocks.map((block, i) => {
    const button = drawTile(exchange, step, block, factsOf(exchange, step, block, null, place), 0);
    button.style.left = `${100 * spans[i][0]}%`;
    button.style.width = `${100 * (spans[i][1] - spans[i][0])}%`;
    return button;
  });
  const elements = blocks.reduce((total, block) => total + elementsOf(exchange, block), 0n);
  const sent = sender === receiver ? "stays" : `${grouped(elements * exchange.sizes.itemSize)} B`;
  return make(
    "td",
    sender === receiver ? { class: "stays" } : {},
    make("div", { class: "area" }, ...tiles),
    sent,
  );
}

function drawTile(exchange: Exchange, step: Step, block: Block, facts: Fact[], row: number): HTMLElement {
  const colours = COLOURS[exchange.plan.ranks];
  const tile = make(
    "button",
    {
      class: "tile",
      type: "button",
      tabindex: "-1",
      "data-block": keyOf(block),
      "data-row": String(row),
      "data-facts": JSON.stringify(facts),
      "aria-label": facts.map(({ name, text }) => `${name}: ${text}`).join(". "),
    },
    make("span", {}, make("span", {}, `${block.tensor[0]} `), labelOf(step, block)),
  );
  const [fill, ink] = colours[block.tokensOf];
  tile.style.setProperty("--fill", fill);
  tile.style.setProperty("--ink", ink);
  tile.style.setProperty("--band", colours[block.headsOf][0]);
  const [from, to] = endsOf(step, block);
  if (from === to) tile.classList.add("own");
  return tile;
}

function drawSwatch(ranks: number, rank: number): HTMLElement {
  const swatch = make("span", { class: "swatch", "aria-hidden": "true" });
  swatch.style.background = COLOURS[ranks][rank][0];
  return swatch;
}

function drawUses(exchange: Exchange, rank: number): HTMLElement {
  const { uses, expand } = usesOf(exchange, rank);
  if (uses.length === 0) return make("p", { class: "uses" }, "No heads: the local attention is not called.");
  const said = uses.map(
    ([run, head]) => `query head${count(run) > 1 ? "s" : ""} ${describe(run)} with kv head ${head}`,
  );
  const more = count(exchange.plan.headRuns.kv[rank]) > uses.length ? ", ..." : "";
  const copied = expand ? " These shares differ, so each query head gets a copy of its kv head." : "";
  return make("p", { class: "uses" }, `${said.join(", ")}${more}.${copied}`);
}

const keyOf = (block: Block): string => `${block.tensor} ${block.tokensOf} ${block.headsOf}`;
