// <seqpar-explorer>: the form, the steps, the picture of the step, and what a block is. It asks no host for anything.

import { Controls } from "./controls.js";
import { neighbour, moveFrom, placesOf } from "./motion.js";
import { bytesOf, SeqparError, table, type Plan } from "./plan.js";
import {
  DRAWN_RANKS,
  fromHash,
  toHash,
  worldOf,
  type Exchange,
  type Setting,
  type World,
} from "./setting.js";
import { STEPS, type Step } from "./steps.js";
import style from "./style.css";
import { drawStep, make, type Child } from "./tiles.js";
import { codeOf, grouped, methodOf, SENTENCES, type Code, type Fact } from "./words.js";

const HINT =
  "Point at a block, or move there with Tab and the arrow keys: its owner, its slice and its bytes.";

// Where there is no page, as in node, there are only the numbers.
const Base = globalThis.HTMLElement ?? (class {} as typeof HTMLElement);

export class Explorer extends Base {
  private setting: Setting = fromHash("");
  private readonly controls = new Controls((part) => this.change(part));
  private readonly message = make("div", { class: "message", "aria-live": "polite" });
  private readonly stepper = make("div", { class: "stepper" });
  private readonly stage = make("section", { class: "stage", id: "stage", "aria-label": "step" });
  private readonly facts = make("div", { class: "facts" });
  private readonly numbers = make("details", { class: "numbers", open: "" });

  connectedCallback(): void {
    const root = this.shadowRoot ?? this.attachShadow({ mode: "open" });
    const sheet = make("style", {}, style);
    root.replaceChildren(
      sheet,
      this.controls.form,
      this.controls.presets,
      this.message,
      this.stepper,
      this.stage,
      this.facts,
      this.numbers,
    );
    this.makeStepper();
    for (const name of ["pointerover", "focusin"])
      this.stage.addEventListener(name, (event) => this.pointAt(event));
    this.stage.addEventListener("keydown", (event) => this.moveAmongTiles(event));
    addEventListener("hashchange", this.readHash);
    this.readHash();
  }

  disconnectedCallback(): void {
    removeEventListener("hashchange", this.readHash);
  }

  private readonly readHash = (): void => {
    if (location.hash && !location.hash.includes("=")) return; // a heading of the page
    this.setting = fromHash(location.hash);
    this.show();
  };

  private change(part: Partial<Setting>): void {
    const moves = Object.keys(part).join() === "step";
    const before = moves ? placesOf(this.tiles()) : null;
    this.setting = { ...this.setting, ...part };
    history.replaceState(history.state, "", toHash(this.setting));
    this.show();
    if (before) moveFrom(before, this.tiles());
  }

  private get step(): Step {
    return STEPS.find((step) => step === this.setting.step) ?? STEPS[0];
  }

  private show(): void {
    this.controls.show(this.setting);
    this.facts.replaceChildren(HINT);
    try {
      this.showWorld(worldOf(this.setting));
    } catch (error) {
      if (!(error instanceof SeqparError)) throw error;
      this.message.replaceChildren(
        make("pre", { class: "error", role: "alert" }, `${error.kind}: ${error.message}`),
      );
      for (const part of [this.stepper, this.stage, this.facts, this.numbers]) part.hidden = true;
    }
  }

  private showWorld(world: World): void {
    const { exchange } = world;
    for (const part of [this.stepper, this.stage, this.facts]) part.hidden = exchange === null;
    this.numbers.hidden = false;
    this.numbers.replaceChildren(...drawNumbers(world));
    if (exchange === null) {
      const said = `Pictures are drawn for up to ${DRAWN_RANKS} ranks. The plan of ${world.plan.ranks} is below.`;
      this.message.replaceChildren(make("p", {}, said));
      return;
    }
    this.message.replaceChildren(make("p", {}, methodOf(exchange)));
    this.markStep();
    const title = make("h3", {}, `${STEPS.indexOf(this.step) + 1}. ${this.step}`);
    const code = make("div", { class: "code" }, ...codeOf(exchange, this.step).map(drawCode));
    this.stage.replaceChildren(
      title,
      make("p", {}, ...withSubscripts(SENTENCES[this.step])),
      code,
      drawStep(exchange, this.step),
    );
    this.tiles()[0]?.setAttribute("tabindex", "0");
  }

  private makeStepper(): void {
    const step = (by: number): void => this.change({ step: STEPS[STEPS.indexOf(this.step) + by] });
    const [back, next] = ["Back", "Next"].map((name) =>
      make("button", { type: "button", class: "turn" }, name),
    );
    back.addEventListener("click", () => step(-1));
    next.addEventListener("click", () => step(1));
    const tabs = make(
      "div",
      { role: "tablist", "aria-label": "steps" },
      ...STEPS.map((name, i) => {
        const called = {
          role: "tab",
          type: "button",
          "aria-controls": "stage",
          "aria-label": `${i + 1} ${name}`,
        };
        const tab = make("button", called, String(i + 1), make("span", {}, ` ${name}`));
        tab.addEventListener("click", () => this.change({ step: name }));
        return tab;
      }),
    );
    tabs.addEventListener("keydown", (event) => this.turnByKey(event));
    this.stepper.replaceChildren(back, tabs, next);
  }

  private markStep(): void {
    const [back, tabs, next] = this.stepper.children as unknown as [
      HTMLButtonElement,
      HTMLElement,
      HTMLButtonElement,
    ];
    const current = STEPS.indexOf(this.step);
    back.disabled = current === 0;
    next.disabled = current === STEPS.length - 1;
    [...tabs.children].forEach((tab, i) => {
      tab.setAttribute("aria-selected", String(i === current));
      tab.setAttribute("tabindex", i === current ? "0" : "-1");
    });
  }

  private turnByKey(event: KeyboardEvent): void {
    const current = STEPS.indexOf(this.step);
    const last = STEPS.length - 1;
    const targets: Record<string, number> = {
      ArrowLeft: current - 1,
      ArrowRight: current + 1,
      Home: 0,
      End: last,
    };
    const target = targets[event.key];
    if (target === undefined) return;
    event.preventDefault();
    const step = Math.min(last, Math.max(0, target));
    if (step !== current) this.change({ step: STEPS[step] });
    (this.stepper.children[1].children[step] as HTMLElement).focus();
  }

  private tiles(): HTMLElement[] {
    return [...this.stage.querySelectorAll<HTMLElement>(".tile")];
  }

  /** Say what the block is, and mark it where it has several pieces. */
  private pointAt(event: Event): void {
    const tile = (event.target as HTMLElement).closest<HTMLElement>(".tile");
    if (!tile) return;
    for (const other of this.tiles()) {
      other.classList.toggle("same", other.dataset.block === tile.dataset.block);
      if (event.type === "focusin") other.setAttribute("tabindex", other === tile ? "0" : "-1");
    }
    const facts = JSON.parse(tile.dataset.facts!) as Fact[];
    this.facts.replaceChildren(
      ...facts.map(({ name, text }) => make("div", {}, make("b", {}, name), ` ${text}`)),
    );
  }

  private moveAmongTiles(event: KeyboardEvent): void {
    const tile = (event.target as HTMLElement).closest<HTMLElement>(".tile");
    if (!tile || !event.key.startsWith("Arrow")) return;
    event.preventDefault();
    neighbour(this.tiles(), tile, event.key)?.focus();
  }
}

/** S_P as S with a small P. */
function withSubscripts(text: string): Child[] {
  return text.split(/_(P)/).map((part, i) => (i % 2 === 1 ? make("sub", {}, part) : part));
}

function drawCode({ file, function: name, lines, ranks }: Code): HTMLElement {
  const caption = make("figcaption", {}, make("code", {}, file), ` ${name} ${ranks}`);
  return make("figure", {}, caption, make("pre", {}, make("code", {}, lines.join("\n"))));
}

/** The plan as Python prints it, and the bytes of a forward pass. */
function drawNumbers({ plan, sizes, exchange }: World): HTMLElement[] {
  const summary = make("summary", {}, "The plan, and the bytes of a forward pass");
  const printed = make("pre", { class: "plan" }, table(plan));
  if (exchange === null) return [summary, printed];
  const matrix = bytesOf(plan, sizes.batch, sizes.headDim, sizes.itemSize);
  return [summary, printed, make("div", { class: "scrolls" }, drawMatrix(plan, matrix, exchange))];
}

function drawMatrix(plan: Plan, matrix: bigint[][], { wire }: Exchange): HTMLElement {
  const add = (row: bigint[]): bigint => row.reduce((total, entry) => total + entry, 0n);
  const cell = (name: string, text: bigint | string): HTMLElement =>
    make(name, {}, typeof text === "string" ? text : grouped(text));
  const row = (head: string, entries: bigint[]): HTMLElement =>
    make("tr", {}, cell("th", head), ...entries.map((entry) => cell("td", entry)), cell("td", add(entries)));
  const heads = plan.tokenRuns.map((_, rank) => cell("th", `to ${rank}`));
  const columns = matrix.map((_, receiver) => add(matrix.map((sent) => sent[receiver])));
  const collectives = wire === "fused" ? "q, k and v in one all-to-all" : "q, k and v in three all-to-alls";
  return make(
    "table",
    { class: "bytes" },
    make("caption", {}, `Bytes: ${collectives}, and one for the output`),
    make("tr", {}, cell("th", ""), ...heads, cell("th", "sent")),
    ...matrix.map((entries, sender) => row(`from ${sender}`, entries)),
    row("received", columns),
  );
}
