"use strict";
(() => {
  const read = (name) => JSON.parse(document.getElementById(name).textContent);
  const rows = read("transcripts"), meanings = read("kinds"); // of a token: its kind's name -> what that is
  const names = Object.fromEntries(Object.keys(meanings).map((name) => [name[0], name]));
  const box = document.getElementById("answers"), told = document.getElementById("told");
  const find = document.getElementById("find"), order = document.getElementById("order");
  const more = document.getElementById("more"), STEP = 20;
  const make = (tag, kind, text) => {
    const one = document.createElement(tag);
    if (kind) one.className = kind;
    if (text !== undefined) one.textContent = text;
    return one;
  };
  rows.forEach((row) => { row.words = row.turns.map((t) => t.asked + "\n" + t.pieces.join("")).join("\n").toLowerCase(); });

  // The tokens of a turn, in the order of the answer: those before any round, then round by round.
  const fill = (place, row) => {
    let before = 0; // rounds of the turns so far: confidences are counted through
    for (const turn of row.turns) {
      place.append(make("p", "faint", turn.asked));
      const text = make("div", "tokens"), bars = make("div", "rounds");
      let at = 0;
      const add = (kind, words) => {
        const piece = turn.pieces[at++], one = make("span", kind, piece);
        if (!piece.trim()) one.classList.add(piece.includes("\n") ? "newline" : "blank"); // still to be seen and touched
        one.dataset.told = words;
        text.append(one);
        return one;
      };
      const [ahead, ...rounds] = turn.kinds; // a letter a token: before any round, then round by round
      for (const letter of ahead) add(names[letter], meanings[names[letter]]);
      rounds.forEach((letters, index) => {
        const sure = row.sure[before + index] || [], refused = turn.refused[index];
        for (let position = 0; position < letters.length; position++) {
          const kind = names[letters[position]];
          let words = `round ${index + 1}, position ${position + 1}: ${kind}`;
          if (position < sure.length && kind !== "bonus") words += `, the draft's confidence ${sure[position]}`;
          if (kind === "corrected" && refused) words += `; drafted was ${JSON.stringify(refused)}`;
          add(kind, words).dataset.round = index;
        }
        const bar = make("i");
        const count = letters.length, accepted = letters.split("a").length - 1;
        bar.style.height = `${4 * count}px`;
        bar.dataset.round = index;
        bar.dataset.told = `round ${index + 1}: ${count} tokens, ${accepted} of them drafted`;
        bars.append(bar);
      });
      before += rounds.length;
      place.append(text, bars);
    }
  };

  let shown = STEP;
  const draw = () => {
    const words = find.value.toLowerCase();
    const found = rows.filter((row) => row.words.includes(words) || row.name.toLowerCase().includes(words));
    if (order.value === "worst") found.reverse();
    box.replaceChildren(...found.slice(0, shown).map((row) => {
      const one = make("details", "answer");
      one.append(make("summary", "", `${row.tau.toFixed(2)} tokens a round · ${row.name} · ${row.turns[0].asked.slice(0, 80)}`));
      one.addEventListener("toggle", () => { if (one.open && one.childElementCount === 1) fill(one, row); });
      return one;
    }));
    if (box.firstChild) box.firstChild.open = true;
    else box.append(make("p", "faint", "nothing found"));
    more.hidden = found.length <= shown;
  };
  const tell = (event) => {
    const one = event.target;
    if (!one.dataset || one.dataset.told === undefined) return;
    told.textContent = one.dataset.told;
    box.querySelectorAll(".lit").forEach((other) => other.classList.remove("lit"));
    if (one.dataset.round === undefined) return;
    const turn = one.tagName === "SPAN" ? one.parentNode : one.parentNode.previousSibling;
    turn.querySelectorAll(`[data-round="${one.dataset.round}"]`).forEach((other) => other.classList.add("lit"));
  };
  box.addEventListener("pointerover", tell);
  box.addEventListener("click", tell);
  find.addEventListener("input", () => { shown = STEP; draw(); });
  order.addEventListener("change", draw);
  more.addEventListener("click", () => { shown += STEP; draw(); });
  draw();
})();
