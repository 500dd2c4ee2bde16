// Runs in every piece of HTML of ours: presses become events of Gradio, the rest is done here.
const events = ['again', 'edit', 'fill', 'cancel', 'pick', 'more'];
const beside = { edit: 'lay', pick: { edit: 'restore', layers: 'unpack' } }; // what fills the fields that hold pictures
// A canvas that is not there yet forgets what it is given: its tab is shown first, and its own start is waited for.
const whenShown = (place, then, tries = 100) => {
  const shown = document.querySelector(place)?.offsetParent;
  if (shown) setTimeout(then, 400);
  else if (tries) setTimeout(() => whenShown(place, then, tries - 1), 100);
};
// Pieces are drawn anew at every step, maybe between a press and its release, and then there is no click: cancelling
// goes by the press. A click without one comes from the keyboard, or is of what stays.
element.addEventListener('pointerdown', (press) => {
  const pressed = press.target.closest('[data-do=cancel]');
  if (!pressed || pressed.disabled || press.button) return; // 0: not for a menu
  pressed.disabled = true;
  trigger('cancel', { ...pressed.dataset });
});
element.addEventListener('click', (click) => {
  const thumb = click.target.closest('[data-show]');
  if (thumb) {
    const stage = thumb.closest('.stage');
    const index = thumb.dataset.show;
    stage.dataset.index = index;
    const address = `/api/jobs/${stage.dataset.job}/images/${index}`;
    stage.querySelector('.shown').src = address;
    const save = stage.querySelector('a[download]');
    if (save) {
      save.href = address;
      save.download = `${stage.dataset.job}-${Number(index) + 1}.png`;
    }
    stage.querySelectorAll('a[data-each]').forEach((one) => {
      one.href = one.href.replace(/layers\/\d+/, `layers/${Math.floor(index / one.dataset.each)}`);
    });
    stage.querySelectorAll('[data-show]').forEach((one) => one.removeAttribute('aria-current'));
    thumb.setAttribute('aria-current', 'true');
    return;
  }
  const pressed = click.target.closest('[data-do]');
  if (!pressed || !events.includes(pressed.dataset.do) || pressed.disabled) return;
  const stage = pressed.closest('.stage');
  const told = { ...pressed.dataset, index: stage?.dataset.index ?? '0' };
  if (pressed.dataset.do === 'cancel') pressed.disabled = true;
  trigger(pressed.dataset.do, told);
  const next = beside[pressed.dataset.do];
  const also = typeof next === 'object' ? next[pressed.dataset.tab] : next;
  if (also) whenShown(also === 'unpack' ? '#source' : '#canvas canvas', () => trigger(also, told));
});
// A job that begins or is shown outside the window is brought into it, once.
let seen;
new MutationObserver(() => {
  const stage = element.querySelector('.stage.busy, .stage.done');
  const job = stage?.dataset.job ?? stage?.querySelector('[data-job]')?.dataset.job;
  if (!job || job === seen) return;
  seen = job;
  setTimeout(() => element.querySelector('.stage')?.scrollIntoView({ block: 'nearest', behavior: 'smooth' }), 300);
}).observe(element, { childList: true, subtree: true });
element.addEventListener('input', (moved) => {
  const compare = moved.target.closest('.compare');
  if (compare) compare.style.setProperty('--at', `${moved.target.value}%`);
});
