package main

import (
	"context"
	"fmt"
	"strconv"
	"time"

	"github.com/gophercloud/gophercloud/v2/openstack/compute/v2/services"

	"github.com/novalet/novalet/tests/bench/report"
)

// series collects pairs by row.
type series map[string][][2]float64

func (s series) add(row string, who int, v float64) {
	if who == 0 {
		s[row] = append(s[row], [2]float64{v})
		return
	}
	s[row][len(s[row])-1][1] = v
}

// append takes over the samples of another series, which is one round's: a round that fails leaves no half of a pair.
func (s series) append(other series) {
	for row, pairs := range other {
		s[row] = append(s[row], pairs...)
	}
}

// notMeasured is why a row is missing that the run has not come to.
const notMeasured = "not measured"

// rows turns the samples there are into the report's rows. Targets are those of the issues that asked for them.
func (b *bench) rows(r *report.Report, s series) {
	r.Rows = nil
	const peer = "nova-compute, fake driver"
	// How long an agent of Neutron's takes that polls is not ours to promise; OVN tells at once.
	total := 0.0
	if b.options["net"] == "ovn" {
		total = 0.8
	}
	for _, row := range []struct {
		id, unit string
		target   float64
	}{{"cast_to_active_nonet", "ms", 0.5}, {"own_time_onenet", "ms", 0.5}, {"total_onenet", "ms", total}, {"wired_wait", "ms", 0}, {"post_to_active_nonet", "ms", 0},
		{"post_to_active_onenet", "ms", 0}, {"concurrent20_nonet", "ms", 0.6}, {"delete", "ms", 0.6}, {"conductor_calls", "calls", 7}, {"rest_calls", "requests", 6},
		{"conductor_calls_delete", "calls", 6}, {"rss_idle_mib", "MiB", 25}, {"rss_200_mib", "MiB", 60},
		{"idle_messages", "a minute", 0.8}, {"idle_bytes", "a minute", 0.6}} {
		switch {
		case row.id == "rest_calls" && b.peerRequests == 0, len(s[row.id]) == 0:
			if r.Missing[row.id] == "" {
				r.Missing[row.id] = notMeasured
			}
			continue
		case row.id == "rest_calls":
			for i := range s[row.id] {
				s[row.id][i][1] = b.peerRequests
			}
		}
		if r.Missing[row.id] == notMeasured {
			delete(r.Missing, row.id)
		}
		r.Add(row.id, row.unit, peer, row.target, s[row.id])
	}
	r.Options["rest_calls"] = "to Neutron, Placement and Glance; the peer's of one boot, from its own log, in a run of its own after the timed ones"
}

// idle watches the bus while nothing happens, and tells what each service sends in a minute.
func (b *bench) idle(s series, d time.Duration) error {
	fmt.Printf("watching the idle bus for %v\n", d)
	from := time.Now()
	time.Sleep(d)
	rows, err := b.services()
	if err != nil {
		return err
	}
	by, unknown := b.tap.senders(from, rows)
	if len(unknown) > 0 {
		return fmt.Errorf("nobody can tell who sent these messages: %v", unknown)
	}
	var messages, bytes [2]float64
	for who, host := range b.hosts {
		if by[host].messages == 0 {
			return fmt.Errorf("%s sent nothing in %v", host, d)
		}
		messages[who] = float64(by[host].messages) / d.Minutes()
		bytes[who] = float64(by[host].bytes) / d.Minutes()
	}
	s["idle_messages"] = append(s["idle_messages"], messages)
	s["idle_bytes"] = append(s["idle_bytes"], bytes)
	return nil
}

// services tells whose row of Nova's services has which id. Only the first versions of the API show it.
func (b *bench) services() (map[int64]string, error) {
	c := *b.compute
	c.Microversion = ""
	page, err := services.List(&c, services.ListOpts{Binary: "nova-compute"}).AllPages(context.Background())
	if err != nil {
		return nil, fmt.Errorf("list the services: %w", err)
	}
	list, err := services.ExtractServices(page)
	if err != nil {
		return nil, fmt.Errorf("list the services: %w", err)
	}
	rows := map[int64]string{}
	for _, s := range list {
		id, err := strconv.ParseInt(s.ID, 10, 64)
		if err != nil {
			return nil, fmt.Errorf("list the services: %w", err)
		}
		rows[id] = s.Host
	}
	return rows, nil
}
