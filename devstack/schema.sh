#!/bin/bash
# schema.sh restore | create: the tables of every service.
#
# Synchronising them takes two minutes of one core, and the result depends on nothing but the packages, so
# create keeps a copy of MariaDB's data folder, taken before any account or service wrote to it, under a
# name made of the packages' versions. restore unpacks it into a new cloud.
set -u
# shellcheck source=devstack/vars.sh
. "$(dirname "$0")/vars.sh"
# shellcheck source=devstack/lib.sh
. "$HERE/lib.sh"

key() {
    # The number changes with what create does.
    { echo 1; cat "$HERE/etc/my.cnf"
      if [ -n "$VENV" ]; then
          dpkg-query -W -f '${Package} ${Version}\n' mariadb-server; cat "$REQUIREMENTS"
      else
          dpkg-query -W -f '${Package} ${Version}\n' mariadb-server 'keystone' glance-common nova-common placement-common neutron-common heat-common python3-oslo.db
      fi; } | sha256sum | cut -c1-16
}
KEPT=$CACHE/schemas-$RELEASE-$(key).tar.gz

new_data_dir() {
    mariadb-install-db --no-defaults --user=mysql --datadir="$1" --auth-root-authentication-method=socket --skip-test-db
}

nova_db() {
    # The cells' addresses are templates, filled in from nova.conf at run time: no password is in the tables.
    local n=(nova-manage --config-file "$ETC/nova.conf") at='{scheme}://{username}:{password}@{hostname}'
    "${n[@]}" api_db sync &&
    "${n[@]}" cell_v2 map_cell0 --database_connection "$at/nova_cell0?{query}" &&
    { [ "$(sql nova_api -e "SELECT COUNT(*) FROM cell_mappings WHERE name = 'cell1'")" = 1 ] ||
      "${n[@]}" cell_v2 create_cell --name cell1 --database_connection "$at/nova?{query}" --transport-url "$at:{port}/"; } &&
    "${n[@]}" db sync
}

keep() {
    mkdir -p "$CACHE" && chmod 700 "$CACHE" && rm -f "$CACHE/schemas-$RELEASE"-*.tar.gz* &&
        tar -C "$STATE/mysql" --exclude=./mysqld.sock --use-compress-program='gzip -1' -cf "$KEPT.new" . && mv "$KEPT.new" "$KEPT"
}

case ${1-} in
restore)
    if [ ! -d "$STATE/mysql" ]; then
        # Under another name until it is whole.
        new=$STATE/mysql.new
        rm -rf "$new"; mkdir "$new"; chown mysql: "$new"
        if [ -r "$KEPT" ]; then
            say "   schemas from $KEPT"
            tar -C "$new" -xzf "$KEPT" || die "$KEPT is damaged: delete it and start again"
            touch "$STATE/done/schemas"
        else
            new_data_dir "$new" >"$LOG/mysql-install.log" 2>&1 || { tail "$LOG/mysql-install.log" >&2; die "create the data folder of MariaDB"; }
        fi
        chmod 755 "$new"; mv "$new" "$STATE/mysql"
    fi ;;
create)
    once keystone-db keystone-manage --config-file "$ETC/keystone.conf" db_sync & p=($!)
    once nova-db nova_db & p+=($!)
    once neutron-db neutron-db-manage --config-file "$ETC/neutron.conf" --config-file "$ETC/ml2_conf.ini" upgrade heads & p+=($!)
    once glance-db glance-manage --config-file "$ETC/glance-api.conf" db_sync & p+=($!)
    once placement-db placement-manage --config-file "$ETC/placement.conf" db sync & p+=($!)
    once heat-db heat-manage --config-file "$ETC/heat.conf" db_sync & p+=($!)
    join "${p[@]}"
    # One schema of Neutron serves every mechanism.
    for d in neutron_linuxbridge neutron_ovs neutron_ovn; do
        [ "$d" = "$NEUTRON" ] || mariadb-dump -S "$MYSQL_SOCK" -u root "$NEUTRON" | sql "$d" || exit 1
    done
    # A clean stop, so that the files alone are the whole truth.
    rm -f "$STATE/done/databases"
    echo "DROP USER 'openstack'@'127.0.0.1';" | sql || exit 1
    stop mariadb 60
    keep || say "   not kept: $CACHE cannot be written"
    start mariadb /usr/sbin/mariadbd --defaults-file="$ETC/my.cnf"
    wait_tcp mariadb 3306 ;;
*) echo "usage: schema.sh restore | create" >&2; exit 2 ;;
esac
