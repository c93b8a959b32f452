package cloud_test

import (
	"fmt"

	"github.com/chromedp/chromedp"
)

// launch fills in Horizon's launch dialog (an Angular form) and sends it.
func (b *browser) launch(name, image, flavor, network string) {
	b.t.Helper()
	b.do("open the instances", chromedp.Navigate(dashboard+"/project/instances/"))
	b.until("the launch button", `(() => { const e = document.querySelector('#instances__action_launch-ng, [id*="launch-ng"]'); if (!e) return false; e.click(); return true })()`)
	b.until("the dialog", `document.querySelector('wizard input[name="name"], .modal input[name="name"]')`)
	b.do("type the name", chromedp.SendKeys(`input[name="name"]`, name, chromedp.ByQuery))
	b.step("Source")
	// A new volume is offered first where there is a volume service; here the image alone.
	b.take(image)
	b.step("Flavor")
	b.take(flavor)
	b.step("Networks")
	b.take(network)
	b.picture("launch")
	b.until("the launch button is enabled", `(() => { const e = [...document.querySelectorAll('.modal button.finish, wizard button.finish')].find(e => !e.disabled); if (!e) return false; e.click(); return true })()`)
	b.until("the dialog closes", `!document.querySelector('wizard')`)
}

// step goes to a step of the wizard.
func (b *browser) step(title string) {
	b.t.Helper()
	b.until("step "+title, fmt.Sprintf(`(() => { const e = [...document.querySelectorAll('wizard .nav-link, wizard .wizard-nav a, wizard li a, wizard nav a')].find(e => e.innerText.trim().startsWith(%q)); if (!e) return false; e.click(); return true })()`, title))
}

// take moves an entry of the visible step from "available" to "allocated".
func (b *browser) take(name string) {
	b.t.Helper()
	b.until("entry "+name, fmt.Sprintf(`(() => {
		for (const r of [...document.querySelectorAll('.modal tr')].filter(e => e.offsetParent !== null)) {
			if (![...r.cells].some(c => c.innerText.trim().split('\n')[0] === %q)) continue;
			const icon = r.querySelector('.fa-arrow-up, .fa-arrow-down');
			if (!icon) continue;
			if (icon.classList.contains('fa-arrow-down')) return true;
			icon.closest('button').click();
			return false;
		}
		return false
	})()`, name))
}
