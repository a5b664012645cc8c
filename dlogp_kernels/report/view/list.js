// A list of which only the visible part is in the document.

class VirtualList {
  /** `estimate(index, width)` is the height of an item before it was there, `render(index)` its element. */
  constructor(scroller, estimate, render, onUpdate = () => {}) {
    Object.assign(this, { scroller, estimate, render, onUpdate, count: 0, width: 0, nodes: new Map() });
    this.canvas = scroller.appendChild(element("div", "canvas"));
    this.offsets = new Float64Array(1);
    scroller.addEventListener("scroll", () => this.update());
    new ResizeObserver(() => {
      if (scroller.clientWidth !== this.width) this.layOut(...this.top());
      else this.update();
    }).observe(scroller);
  }

  /** The item at the top, and how far it is scrolled beyond its begin. */
  top() {
    const index = Math.min(lastBelow(this.offsets, this.scroller.scrollTop), Math.max(0, this.count - 1));
    return [index, this.scroller.scrollTop - this.offsets[index]];
  }

  show(number, top = 0) {
    this.count = number;
    this.layOut(top);
  }

  layOut(top, shift = 0) {
    this.width = this.scroller.clientWidth;
    const heights = Float64Array.from({ length: this.count }, (_, index) => this.estimate(index, this.width));
    this.setHeights(heights);
    this.redraw();
    this.reveal(top, shift);
  }

  setHeights(heights) {
    this.heights = heights;
    this.offsets = new Float64Array(heights.length + 1);
    heights.forEach((height, index) => (this.offsets[index + 1] = this.offsets[index] + height));
    this.canvas.style.height = `${this.offsets[heights.length]}px`;
  }

  /** Render these items anew, all by default. */
  redraw(...indices) {
    for (const index of indices.length ? indices : [...this.nodes.keys()]) {
      this.nodes.get(index)?.remove();
      this.nodes.delete(index);
    }
    this.update();
  }

  reveal(index, shift = 0) {
    // Where heights turn out others than estimated, the second time is exact.
    for (let time = 0; time < 2; time++) {
      this.scroller.scrollTop = (this.offsets[index] ?? 0) + shift;
      this.update();
    }
  }

  revealIfHidden(index) {
    const { scrollTop, clientHeight } = this.scroller;
    if (this.offsets[index] < scrollTop || this.offsets[index + 1] > scrollTop + clientHeight)
      this.reveal(index, -clientHeight / 3);
  }

  update() {
    const { scroller, nodes } = this;
    if (!scroller.clientHeight) return; // hidden, where nothing has a height
    const margin = scroller.clientHeight / 2;
    for (let time = 0; time < 4; time++) {
      const [top, shift] = this.top();
      const first = lastBelow(this.offsets, scroller.scrollTop - margin);
      const end = scroller.scrollTop + scroller.clientHeight + margin;
      const last = Math.min(this.count - 1, lastBelow(this.offsets, end));
      for (const [index, node] of nodes)
        if (index < first || index > last) {
          node.remove();
          nodes.delete(index);
        }
      const made = [];
      for (let index = first; index <= last; index++)
        if (!nodes.has(index)) {
          nodes.set(index, this.render(index));
          made.push(index);
        }
      // In their order, for those who read by the document: from the last on, each before its next.
      for (const index of made.toReversed()) this.canvas.insertBefore(nodes.get(index), nodes.get(index + 1) ?? null);
      const measured = made.map((index) => nodes.get(index).offsetHeight);
      const changed = made.filter((index, place) => Math.abs(measured[place] - this.heights[index]) > 0.5);
      if (changed.length) {
        made.forEach((index, place) => (this.heights[index] = measured[place]));
        this.setHeights(this.heights);
        // What the reader sees stays where it is.
        scroller.scrollTop = this.offsets[top] + shift;
      }
      if (made.length)
        for (const [index, node] of nodes) node.style.transform = `translateY(${this.offsets[index]}px)`;
      if (!changed.length) break;
    }
    this.onUpdate();
  }
}
