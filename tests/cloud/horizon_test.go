package cloud_test

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/chromedp/chromedp"
	"github.com/gophercloud/gophercloud/v2/openstack/compute/v2/servers"
)

const dashboard = "http://127.0.0.1:8080"

// browser is a headless Chromium that is logged in to Horizon.
type browser struct {
	t   *testing.T
	ctx context.Context
	dir string
	n   int
}

// horizon starts the dashboard and a browser, and logs a user in.
func horizon(t *testing.T, u *user) *browser {
	t.Helper()
	bin := "/usr/bin/chromium"
	if _, err := os.Stat(bin); err != nil {
		t.Fatalf("package chromium: %v", err)
	}
	devstack(t, "horizon.sh", "start")
	// Not the test's own folder: the browser's processes write to it until the last of them is gone, which is no failure.
	profile, err := os.MkdirTemp("", "novalet-browser")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		for range 100 {
			if os.RemoveAll(profile) == nil {
				return
			}
			time.Sleep(100 * time.Millisecond)
		}
		t.Logf("%s is left", profile)
	})
	opts := append(chromedp.DefaultExecAllocatorOptions[:], chromedp.ExecPath(bin), chromedp.NoSandbox, chromedp.DisableGPU,
		chromedp.WindowSize(1400, 1000), chromedp.Flag("disable-quic", true), chromedp.Flag("disable-component-update", true),
		chromedp.Flag("disable-dev-shm-usage", true), chromedp.WSURLReadTimeout(2*time.Minute), chromedp.UserDataDir(profile))
	ctx, cancel := chromedp.NewExecAllocator(context.Background(), opts...)
	t.Cleanup(cancel)
	ctx, cancel = chromedp.NewContext(ctx)
	t.Cleanup(cancel)
	dir := filepath.Join("..", "..", "build", "horizon")
	if err := os.MkdirAll(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	b := &browser{t: t, ctx: ctx, dir: dir}
	// The first context of a browser must not have a deadline: it would end the browser.
	if err := chromedp.Run(ctx, chromedp.Navigate("about:blank")); err != nil {
		t.Fatalf("start the browser: %v", err)
	}
	b.do("log in", chromedp.Navigate(dashboard+"/auth/login/"), chromedp.WaitVisible("#id_username"), b.eval(`
		const d = document.querySelector('#id_domain'); if (d) d.value = 'Default';
		document.querySelector('#id_username').value = `+quote(u.env["OS_USERNAME"])+`;
		document.querySelector('#id_password').value = `+quote(u.env["OS_PASSWORD"])+`;
		document.querySelector('form').submit()`))
	b.until("the overview", `!!document.querySelector('.topbar, .navbar') && !document.querySelector('#id_password')`)
	return b
}

func quote(s string) string { return fmt.Sprintf("%q", s) }

func (b *browser) eval(js string) chromedp.Action {
	return chromedp.Evaluate("(() => {"+js+"})()", nil)
}

// do runs actions within a deadline.
func (b *browser) do(what string, actions ...chromedp.Action) {
	b.t.Helper()
	ctx, cancel := context.WithTimeout(b.ctx, 2*time.Minute)
	defer cancel()
	if err := chromedp.Run(ctx, actions...); err != nil {
		b.picture("failed")
		b.t.Fatalf("%s: %v", what, err)
	}
}

// until waits until a JavaScript expression is true of the page, whatever page that is by then.
func (b *browser) until(what, js string) {
	b.t.Helper()
	deadline := time.Now().Add(long)
	for {
		var ok bool
		ctx, cancel := context.WithTimeout(b.ctx, time.Minute)
		err := chromedp.Run(ctx, chromedp.Evaluate("!!("+js+")", &ok))
		cancel()
		if err == nil && ok {
			return
		}
		if time.Now().After(deadline) {
			var text string
			_ = chromedp.Run(b.ctx, chromedp.Evaluate("location.href + ' ' + document.body.innerText", &text))
			var html string
			_ = chromedp.Run(b.ctx, chromedp.OuterHTML("html", &html))
			_ = os.WriteFile(filepath.Join(b.dir, "failed.html"), []byte(html), 0o644)
			b.picture("failed")
			b.t.Fatalf("%s: not within %v: %v; the page: %.1500s", what, long, err, text)
		}
		time.Sleep(300 * time.Millisecond)
	}
}

// picture keeps a screenshot for people to look at.
func (b *browser) picture(name string) {
	var png []byte
	ctx, cancel := context.WithTimeout(b.ctx, time.Minute)
	defer cancel()
	if err := chromedp.Run(ctx, chromedp.CaptureScreenshot(&png)); err == nil {
		b.n++
		_ = os.WriteFile(filepath.Join(b.dir, fmt.Sprintf("%02d-%s.png", b.n, name)), png, 0o644)
	}
}

// row is a JavaScript expression for the table row of a server.
func row(id string) string { return `document.querySelector('tr[data-object-id="` + id + `"]')` }

// menu clicks an entry of a server's row menu and confirms the dialog if one comes.
func (b *browser) menu(id, action string) {
	b.t.Helper()
	b.do("open the instances", chromedp.Navigate(dashboard+"/project/instances/"))
	b.until("the row", row(id))
	b.until("the entry "+action, `(() => { const e = `+row(id)+`.querySelector('[id$="action_`+action+`"], [name$="__`+action+`__`+id+`"], [value$="__`+action+`__`+id+`"]'); if (!e) return false; e.click(); return true })()`)
	b.until("the dialog", `document.querySelector('.modal.in .btn-danger, .modal.in .btn-primary, .modal.show .btn-danger, .modal.show .btn-primary')`)
	b.until("the confirmation", `(() => { const e = document.querySelector('.modal.in .modal-footer .btn-danger, .modal.in .modal-footer .btn-primary, .modal.show .modal-footer .btn-danger, .modal.show .modal-footer .btn-primary'); if (!e) return false; e.click(); return true })()`)
}

// TestHorizon does in a real browser what users do there.
func TestHorizon(t *testing.T) {
	u := as(t, "demo")
	image := appImage.id(t, u)
	leavesNothing(t)
	b := horizon(t, u)
	var id string

	b.launch("from-horizon", "novalet-test-app", "m1.tiny", privateNet(u))
	eventually(t, long, "the launched server appears", func() error {
		ids := serversNamed(t, u, "from-horizon")
		if len(ids) != 1 {
			return fmt.Errorf("%d servers of that name", len(ids))
		}
		id = ids[0]
		return nil
	})
	t.Cleanup(func() { remove(t, u, id) })
	s := waitStatus(t, u, id, "ACTIVE")
	if s.Image["id"] != image {
		t.Errorf("launched from image %v", s.Image)
	}
	ip, _ := fixedIP(t, u, id)
	t.Run("list", func(t *testing.T) {
		b.do("open the instances", chromedp.Navigate(dashboard+"/project/instances/"))
		b.until("name, address, state and power state in the row", `(t => t.includes("from-horizon") && t.includes("`+ip+`") && t.includes("Active") && t.includes("Running"))(`+row(id)+`.innerText)`)
		b.picture("list")
	})
	t.Run("tabs", func(t *testing.T) {
		for tab, want := range map[string]string{"overview": ip, "log": "hello from from-horizon", "audit": "create"} {
			b.do("open the tab", chromedp.Navigate(dashboard+"/project/instances/"+id+"/?tab=instance_details__"+tab))
			b.until("tab "+tab+" shows "+want, `document.body.innerText.toLowerCase().includes(`+quote(want)+`)`)
			b.picture(tab)
		}
	})
	t.Run("row menu", func(t *testing.T) {
		b.menu(id, "stop")
		waitStatus(t, u, id, "SHUTOFF")
		b.do("open the instances", chromedp.Navigate(dashboard+"/project/instances/"))
		b.until("start is offered", `(() => { const e = `+row(id)+`.querySelector('[id$="action_start"]'); if (!e) return false; e.click(); return true })()`)
		waitStatus(t, u, id, "ACTIVE")
		b.menu(id, "delete")
		eventually(t, long, "the server is gone", func() error {
			if got, err := servers.Get(t.Context(), u.compute, id).Extract(); err == nil {
				return fmt.Errorf("status %s", got.Status)
			}
			return nil
		})
	})
	t.Run("hypervisors", func(t *testing.T) {
		a := horizon(t, as(t, "admin"))
		a.do("open the hypervisors", chromedp.Navigate(dashboard+"/admin/hypervisors/"))
		a.until("host, type and processors", `(t => t.includes("`+computeHost()+`") && t.includes("novalet"))(document.body.innerText)`)
		var text string
		a.do("read the row", chromedp.Evaluate(`[...document.querySelectorAll('tr')].map(r => r.innerText).filter(t => t.includes("`+computeHost()+`")).join("\n")`, &text))
		a.picture("hypervisors")
		if !strings.Contains(text, fmt.Sprint(cpus(t))) || !strings.Contains(text, "GB") {
			t.Errorf("the hypervisor's row: %q", text)
		}
	})
}
