() => {
  const body = document.body;
  const chosen = window.lantingShade;
  if (chosen) body.classList.toggle('dark', chosen === 'dark');
  document.addEventListener('click', (click) => {
    if (!click.target.closest('#shade')) return;
    body.classList.toggle('dark');
    localStorage.setItem('lanting-shade', body.classList.contains('dark') ? 'dark' : 'light');
  });
}
