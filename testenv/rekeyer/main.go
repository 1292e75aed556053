// Command rekeyer asks for CHILD_SA rekeys at two gateways in turn, over their
// operator sockets, and waits for each until both ends hold the same fresh SAs.
// It prints what it saw; exit status 1 if a rekey did not come or a Key-ID came
// twice. One process instead of many: the machine of the scenarios is slow.
//
// With -vici the sockets are charon's, for a connection without Q-IPsec; then the
// SPIs stand for the Key-ID.
package main

import (
	"context"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"slices"
	"strings"
	"syscall"
	"time"

	"github.com/q-ipsec/q-ipsec/kms/operator"
)

func main() {
	var r run
	a := flag.String("a", "", "operator `socket` of one gateway")
	b := flag.String("b", "", "operator `socket` of the other")
	flag.StringVar(&r.conn, "connection", "a-b", "its `name`, at both ends")
	flag.IntVar(&r.count, "count", 100, "rekeys")
	flag.DurationVar(&r.patience, "patience", 30*time.Second, "bound of one rekey")
	flag.DurationVar(&r.interval, "interval", 0, "from the beginning of a rekey to that of the next, at least")
	stock := flag.Bool("vici", false, "the sockets are charon's")
	flag.Parse()
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	for i, socket := range []string{*a, *b} {
		if *stock {
			r.ends[i] = &charon{socket: socket, conn: r.conn}
		} else {
			r.ends[i] = &qipsecd{operator.NewClient(socket), r.conn}
		}
	}
	if err := r.all(ctx); err != nil {
		fmt.Fprintln(os.Stderr, "rekeyer:", err)
		os.Exit(1)
	}
}

type run struct {
	ends     [2]gateway
	conn     string
	count    int
	patience time.Duration
	interval time.Duration
	seen     map[string]bool // Key-IDs that keyed a CHILD_SA
}

func (r *run) all(ctx context.Context) error {
	id, err := r.await(ctx, "")
	if err != nil {
		return fmt.Errorf("no tunnel to rekey: %w", err)
	}
	r.seen = map[string]bool{id: true}
	var took []time.Duration
	for i := range r.count {
		start := time.Now()
		if err := r.ends[i%2].rekey(ctx); err != nil {
			return fmt.Errorf("rekey %d: %w", i+1, err)
		}
		next, err := r.await(ctx, id)
		if err != nil {
			return fmt.Errorf("rekey %d: %w", i+1, err)
		}
		if r.seen[next] {
			return fmt.Errorf("rekey %d: Key-ID %s a second time", i+1, next)
		}
		id = next
		r.seen[id] = true
		took = append(took, time.Since(start))
		if (i+1)%25 == 0 {
			fmt.Printf("%d rekeys\n", i+1)
		}
		time.Sleep(time.Until(start.Add(r.interval)))
	}
	slices.Sort(took)
	fmt.Printf("%d rekeys, %d Key-IDs, a rekey took %v (median), %v at most\n", r.count, len(r.seen),
		took[len(took)/2].Round(time.Millisecond), took[len(took)-1].Round(time.Millisecond))
	return nil
}

// await gives the Key-ID of a CHILD_SA that both ends hold in both directions
// with equal keys, other than old and not seen before.
func (r *run) await(ctx context.Context, old string) (string, error) {
	ctx, cancel := context.WithTimeout(ctx, r.patience)
	defer cancel()
	for {
		id, err := r.common(ctx, old)
		if id != "" || err != nil {
			return id, err
		}
		select {
		case <-ctx.Done():
			return "", fmt.Errorf("both ends hold no fresh SAs with equal keys: %w", ctx.Err())
		case <-time.After(20 * time.Millisecond):
		}
	}
}

func (r *run) common(ctx context.Context, old string) (string, error) {
	var prints [2]map[string]string // by Key-ID and SPI
	for i, g := range r.ends {
		sas, err := g.sas(ctx)
		if err != nil {
			return "", err
		}
		prints[i] = sas
	}
	count := map[string]int{}
	for k, f := range prints[0] {
		if id, _, _ := strings.Cut(k, " "); prints[1][k] == f && f != "" && id != old && !r.seen[id] {
			count[id]++
		}
	}
	for id, n := range count {
		if n == 2 {
			return id, nil
		}
	}
	return "", nil
}
